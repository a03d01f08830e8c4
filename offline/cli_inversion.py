"""`hardlook-lab invert image|text|table`: see what an encoder sees. Libraries are imported inside the commands."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from offline.cli_inversion_text import text
from offline.cli_options import EncoderNames, JsonFile, Precision, use_threads, write_json

invert = App(name="invert", help="Pictures whose embedding under an encoder is that of an image or a text.")
invert.command(text)

_Images = Annotated[list[Path] | None, Parameter(help="Image file; repeat. Default: six public photographs.")]
_Seeds = Annotated[list[int] | None, Parameter(help="Of the start; repeat for several reconstructions. Default: 0.")]

_Judges = Annotated[list[str] | None, Parameter(help="Encoder that judges; repeat. Default: those of the run.")]


@invert.command
def image(
    *,
    encoder: EncoderNames,
    run: Path,
    image: _Images = None,
    folder: Path | None = None,
    seed: _Seeds = None,
    steps: int | None = None,
    radius: float | None = None,
    optimiser: Literal["apgd", "multi-view"] = "apgd",
    batch_size: int = 8,
    precision: Precision = "fp32",
    device: str = "cpu",
    threads: int | None = None,
    json_file: JsonFile = None,
) -> None:
    """Reconstruct images from their embeddings (Eq. 9), or go on with a run that was stopped.

    Args:
        run: Run directory; the same plan resumes. `preview.png` in it shows how far it is, `grid.png` the result.
        folder: All images below a folder, instead of --image.
        steps: Updates; default 500, of the multi-view optimiser 1000.
        radius: l2 radius around the noisy grey, at the encoder's own input size. Default: 100 at 224 px, scaled with
            the side of the input, so that each value may change as much.
        optimiser: APGD in the l2 ball, or Adam over augmented views.
        batch_size: Reconstructions that are sought together.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.errors import PlanError
    from offline.inversion.plan import InversionPlan
    from offline.inversion.run import run_inversion
    from offline.inversion.shown import describe
    from offline.inversion.sources import public_photographs, read_folder, read_images
    from offline.progress import ProgressDisplay

    use_threads(threads)
    plan = InversionPlan(
        encoders=tuple(encoder),
        precision=precision,
        optimiser=optimiser,
        steps=steps,
        radius=radius,
        seeds=(0,) if seed is None else tuple(seed),
        batch=batch_size,
    )
    if image is not None and folder is not None:
        raise PlanError("give --image or --folder, not both")
    if folder is not None:
        sources = read_folder(folder)
    else:
        sources = public_photographs() if image is None else read_images(image)
    with ProgressDisplay() as display:
        results = run_inversion(plan, sources, run, device=device, show=display.update)
    print(describe(results), end="")
    write_json(json_file, results.as_dict())


@invert.command
def table(
    *,
    run: Path,
    evaluate: _Judges = None,
    eight_bit: bool = False,
    resamples: int = 1000,
    bootstrap_seed: int = 0,
    csv: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    json_file: JsonFile = None,
) -> None:
    """Table VII: the mean cosine of images and their reconstructions, by who reconstructed and who judges.

    Args:
        run: Run directory of `invert image`, finished.
        eight_bit: Judge the PNG files in place of the exact values.
        resamples: Of the images, for the 95 % intervals.
        bootstrap_seed: Of the resamples.
        csv: Also write one row a cell to this file.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.inversion.table import cross_table
    from offline.progress import ProgressDisplay

    use_threads(threads)
    with ProgressDisplay() as display:
        found = cross_table(
            run,
            evaluate,
            eight_bit=eight_bit,
            resamples=resamples,
            seed=bootstrap_seed,
            device=device,
            show=display.update,
        )
    print(found.as_text(), end="")
    if csv is not None:
        csv.write_text(found.as_csv())
    write_json(json_file, found.as_dict())
