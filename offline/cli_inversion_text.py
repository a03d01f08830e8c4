"""`hardlook-lab invert text`: what an encoder sees in words. Libraries are imported inside the command."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from offline.cli_options import EncoderNames, JsonFile, Precision, use_threads, write_json

_Texts = Annotated[list[str], Parameter(help="What to reconstruct; repeat for several.")]
_Seeds = Annotated[list[int] | None, Parameter(help="Of the start; repeat for several reconstructions. Default: 0.")]

# Of the multi-view optimiser alone.
_Views = Annotated[int | None, Parameter(help="Views at each update of the multi-view optimiser; default 32.")]
_Rate = Annotated[float | None, Parameter(help="Learning rate of its Adam, in pixel values; default 0.1.")]
_Policy = Annotated[
    str | None,
    Parameter(
        help="Augmentations of its views, in order, of color, translation, resize and cutout; default "
        "'color,translation,cutout'."
    ),
]
_Noise = Annotated[
    float | None, Parameter(help="Deviation of Gaussian noise on its views; default 0, CLIPAG's is 0.01.")
]
_Decay = Annotated[float | None, Parameter(help="AdamW's, towards black; default 0, CLIPAG's is 0.01.")]


def text(
    *,
    encoder: EncoderNames,
    text: _Texts,
    run: Path,
    template: str = "{}",
    seed: _Seeds = None,
    optimiser: Literal["apgd", "multi-view"] = "apgd",
    steps: int | None = None,
    radius: float | None = None,
    views: _Views = None,
    lr: _Rate = None,
    policy: _Policy = None,
    noise: _Noise = None,
    weight_decay: _Decay = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
    device: str = "cpu",
    threads: int | None = None,
    json_file: JsonFile = None,
) -> None:
    """Look for pictures of texts (Eq. 10), and show each to every encoder given, or go on with a run that was stopped.

    Each encoder needs a text tower. A picture that other encoders take for the same text shows what the text means to
    them all; one that only its own encoder recognises shows what that one can be fooled with.

    Args:
        run: Run directory; the same plan resumes. `preview.png` in it shows how far it is, `grid.png` the result.
        template: What becomes a prompt, with the text in the place of its '{}', such as 'a photo of a {}'.
        optimiser: APGD in an l2 ball around noisy grey, or Adam over augmented views.
        steps: Updates; default 500, of the multi-view optimiser 1000.
        radius: Of APGD, at the encoder's own input size; default 100 at 224 px, scaled with the side of the input.
        batch_size: Reconstructions that are sought together.
        device: torch device, such as 'cpu' or 'cuda'.
        threads: CPU threads; default all.
    """
    from offline.inversion.texts import TextPlan, TextSources, invert_texts
    from offline.progress import ProgressDisplay

    use_threads(threads)
    plan = TextPlan(
        encoders=tuple(encoder),
        precision=precision,
        optimiser=optimiser,
        steps=steps,
        radius=radius,
        seeds=(0,) if seed is None else tuple(seed),
        batch=batch_size,
        views=views,
        lr=lr,
        policy=policy,
        noise=noise,
        weight_decay=weight_decay,
    )
    sources = TextSources(tuple(text), template)
    with ProgressDisplay() as display:
        found = invert_texts(plan, sources, run, device=device, show=display.update)
    print(found.describe(), end="")
    print(f"grid: {run / 'grid.png'}")
    write_json(json_file, found.as_dict())
