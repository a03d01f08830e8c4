"""`hardlook-lab benchmark nights|bapps|steps|zero-shot|imagenet|nsfw|detector|dangerous-objects`: published tables."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from offline.cli_options import DataFolder, EncoderNames, JsonFile, use_threads, write_json

if TYPE_CHECKING:
    from offline.benchmarks.published import Figure
    from offline.benchmarks.suites import Show, SuiteRequest


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """What all suites are asked with; see `offline.benchmarks.suites.SuiteRequest`."""

    encoder: EncoderNames
    folder: Annotated[Path | None, Parameter(help="The data set's folder. Default: DATA/SUITE.")] = None
    run: Annotated[Path | None, Parameter(help="Run directory, which resumes; needed for attacks.")] = None
    clean_only: Annotated[bool, Parameter(help="No attacks.")] = False
    limit: Annotated[int, Parameter(help="Images or triplets; 0 for the protocol's number.")] = 0
    steps: Annotated[int, Parameter(help="Of the attacks; 0 for the protocol's number.")] = 0
    square: Annotated[int, Parameter(help="Queries of the Square attack on what survives.")] = 0
    batch: Annotated[int, Parameter(help="Images that are encoded or attacked together.")] = 64
    seed: Annotated[int, Parameter(help="Of choices and random starts.")] = 0
    device: Annotated[str, Parameter(help="torch device, such as 'cpu' or 'cuda'.")] = "cpu"
    threads: Annotated[int | None, Parameter(help="CPU threads; default all.")] = None
    data: DataFolder = None
    json_file: JsonFile = None

    def request(self, suite: str) -> "SuiteRequest":
        """What is asked of a suite whose folder is called so by default."""
        from offline.benchmarks.suites import SuiteRequest
        from offline.data.archives import data_root

        return SuiteRequest(
            encoders=tuple(self.encoder),
            folder=self.folder if self.folder is not None else data_root(self.data) / suite,
            run=self.run,
            clean_only=self.clean_only,
            limit=self.limit,
            steps=self.steps,
            square_queries=self.square,
            batch=self.batch,
            seed=self.seed,
            device=self.device,
        )


def measure(options: SuiteOptions, suite: str, run: Callable[["SuiteRequest", "Show"], Sequence["Figure"]]) -> None:
    """Run a suite, print its table, and write it as JSON on request.

    Args:
        suite: its name, and that of its default folder.
        run: the suite.
    """
    from offline.benchmarks.published import figure_table, figures_as_json
    from offline.progress import ProgressDisplay

    use_threads(options.threads)
    request = options.request(suite)
    with ProgressDisplay() as display:
        figures = run(request, display.update)
    print(figure_table(figures), end="")
    if request.departures:
        print(f"Not the published protocol, so that differences from it mean little: {request.departures}.")
    asked: dict[str, Any] = {"suite": suite, "departures": request.departures}
    write_json(options.json_file, {**asked, "figures": figures_as_json(figures)})


def add_commands(benchmark: App) -> None:
    """Add the commands to `hardlook-lab benchmark`."""
    for command in (nights, bapps, steps, zero_shot, imagenet, nsfw, detector, dangerous_objects):
        benchmark.command(command)


def nights(*, options: SuiteOptions) -> None:
    """NIGHTS (tables I, II and XIII): both test splits together and each, clean and under APGD (linf 4/255, l2 3)."""
    from offline.benchmarks import suite_two_afc

    measure(options, "nights", suite_two_afc.nights)


def steps(*, options: SuiteOptions) -> None:
    """NIGHTS by steps of the attack (table VI): 50, 100, 200, 500 and 1000, under both norms."""
    from offline.benchmarks import suite_two_afc

    measure(dataclasses.replace(options, folder=_of(options, "nights")), "steps", suite_two_afc.steps)


def bapps(*, options: SuiteOptions, soft: bool = False) -> None:
    """BAPPS (tables I, II, XIV and XV): the mean of its six splits and each, clean and under APGD (linf 4/255, l2 3).

    Args:
        soft: Also LPIPS's own score, beside what a rater at random gets.
    """
    from offline.benchmarks import suite_two_afc

    measure(options, "bapps", lambda request, show: suite_two_afc.bapps(request, show, soft=soft))


def zero_shot(*, options: SuiteOptions, sets: list[str] | None = None, classes: list[Path] | None = None) -> None:
    """Zero-shot classification (table XI): the average of 13 sets and each, clean and under APGD-CE and APGD-T.

    Args:
        sets: Only this one, such as cifar10; repeat. Default: those that the folder holds.
        classes: CLIP_benchmark's en_classnames.json or en_zeroshot_classification_templates.json, for sets that have no
            text files beside their images; repeat.
    """
    from offline.benchmarks import suite_zero_shot

    def run(request: "SuiteRequest", show: "Show") -> Sequence["Figure"]:
        return suite_zero_shot.zero_shot(request, show, sets=sets or (), prompts=classes or ())

    measure(options, "zero-shot", run)


def imagenet(*, options: SuiteOptions) -> None:
    """ImageNet zero-shot (table XI): 5,000 validation images, clean and under APGD-CE and APGD-T."""
    from offline.benchmarks import suite_zero_shot

    measure(options, "imagenet", suite_zero_shot.imagenet)


_PoolSize = Annotated[int, Parameter(help="Exemplars of each pool.")]


def nsfw(*, options: SuiteOptions, pool_size: _PoolSize = 500) -> None:
    """The NSFW decision (tables III and VIII): safe, buffer and unsafe answers, clean and attacked (linf 8/255)."""
    from offline.benchmarks import suite_moderation

    measure(options, "nsfw", lambda request, show: suite_moderation.nsfw(request, show, pool_size=pool_size))


def detector(
    *,
    options: SuiteOptions,
    head: Path | None = None,
    detector_encoder: str = "clip-vit-l-14",
    threshold: float = 0.5,
    pool_size: _PoolSize = 500,
) -> None:
    """A detector, pools without a buffer, and the OR of both on the NSFW images (table IV), each attacked for itself.

    Args:
        head: The detector's head; default DATA/weights/laion_nsfw_head_vitl14.npz.
        detector_encoder: Whose embeddings the head takes.
        threshold: Of the head's probability.
    """
    from offline.benchmarks import suite_moderation
    from offline.benchmarks.suite_moderation import Detector
    from offline.data.archives import data_root

    file = head if head is not None else data_root(options.data) / "weights" / "laion_nsfw_head_vitl14.npz"
    against = Detector(file, detector_encoder, threshold)
    measure(
        dataclasses.replace(options, folder=_of(options, "nsfw")),
        "detector",
        lambda request, show: suite_moderation.detector(request, show, against, pool_size=pool_size),
    )


def dangerous_objects(*, options: SuiteOptions, pool_size: _PoolSize = 500) -> None:
    """Firearms among ImageNet's images, over pools of Flickr photographs (table X), clean and attacked (linf 8/255)."""
    from offline.benchmarks import suite_moderation

    def run(request: "SuiteRequest", show: "Show") -> Sequence["Figure"]:
        return suite_moderation.dangerous_objects(request, show, pool_size=pool_size)

    measure(options, "dangerous-objects", run)


def _of(options: SuiteOptions, suite: str) -> Path:
    """The folder of another suite's data."""
    from offline.data.archives import data_root

    return options.folder if options.folder is not None else data_root(options.data) / suite
