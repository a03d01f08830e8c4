"""Text inversion (Eq. 10): pictures sought for prompts, and who else recognises them (the paper's Figures 5, 6 and 10).

Owns the prompts as targets, and the cross table: each picture is shown to every encoder of the run, and ranked among
the prompts by zero-shot classification. Only encoders with a text tower can take part, which is found out first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offline.errors import PlanError
from offline.inversion.augment import PAPERS_POLICY, DiffAugment
from offline.inversion.multi_view import LR, VIEWS, MultiViewInversion
from offline.inversion.optimiser import Optimiser
from offline.inversion.plan import MULTI_VIEW_STEPS, InversionPlan
from offline.inversion.problem import Target
from offline.inversion.run import Results, Show, run_inversion
from offline.inversion.store import Record, Store
from perception.encoder import Encoder, Precision
from perception.errors import CheckpointError
from perception.preprocess import to_pixels
from perception.text import TextEncoder

PLACE = "{}"
_SAME = 1e-6  # of the squared distance of two unit embeddings, float32


@dataclass(frozen=True)
class TextPlan(InversionPlan):
    """An `InversionPlan` with the multi-view optimiser's own settings; see `MultiViewInversion`.

    Attributes:
        views, lr, policy, noise, weight_decay: None for what is published; of the multi-view optimiser alone.
    """

    views: int | None = None
    lr: float | None = None
    policy: str | None = None
    noise: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: see `InversionPlan` and `MultiViewInversion`; or a setting is not of this optimiser.
        """
        super().__post_init__()
        if self.optimiser != "multi-view":
            for name in ("views", "lr", "policy", "noise", "weight_decay"):
                if getattr(self, name) is not None:
                    raise PlanError(f"{name} is a setting of the multi-view optimiser, {self.optimiser} has none")
        self.make_optimiser()

    def make_optimiser(self) -> Optimiser:
        """See `InversionPlan`."""
        if self.optimiser != "multi-view":
            return super().make_optimiser()
        return MultiViewInversion(
            steps=MULTI_VIEW_STEPS if self.steps is None else self.steps,
            views=VIEWS if self.views is None else self.views,
            lr=LR if self.lr is None else self.lr,
            policy=PAPERS_POLICY if self.policy is None else DiffAugment.parse(self.policy).policy,
            noise=self.noise or 0.0,
            weight_decay=self.weight_decay or 0.0,
        )


@dataclass(frozen=True)
class TextSources:
    """Texts to invert; see `offline.inversion.sources.Sources`. Their ids are the texts, without the template.

    Attributes:
        texts: different ones, none of them blank.
        template: what becomes a prompt with a text in the place of its one '{}'.
    """

    texts: tuple[str, ...]
    template: str = PLACE
    kind: str = field(default="text", init=False)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            PlanError: no text, a blank one, one twice but for white space, one that is no Unicode, or a template
                without exactly one '{}'.
        """
        if not self.texts:
            raise PlanError("text inversion needs at least one text")
        if self.template.count(PLACE) != 1:
            raise PlanError(f"a template needs exactly one '{PLACE}' for the text, got {self.template!r}")
        seen: set[str] = set()
        for text in (self.template, *self.texts):
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise PlanError(f"a text must be Unicode, got {text!r}")
        for text in self.texts:
            if not text.strip():
                raise PlanError(f"a text must not be blank, got {text!r}")
            words = " ".join(text.split())
            if words in seen:
                raise PlanError(f"the text {text!r} is given twice")
            seen.add(words)

    @property
    def ids(self) -> tuple[str, ...]:
        """See `Sources`."""
        return self.texts

    @property
    def prompts(self) -> tuple[str, ...]:
        """What is encoded."""
        return tuple(self.template.replace(PLACE, text) for text in self.texts)

    def as_dict(self) -> dict[str, Any]:
        """See `Sources`."""
        return {"texts": list(self.texts), "template": self.template}

    def embeddings(self, encoder: Encoder) -> Tensor:
        """(n, d) unit embeddings of the prompts by the encoder's own text tower, each encoded by itself.

        Raises:
            PlanError: it has none, or cannot tell two of the prompts apart.
        """
        tower = _text_tower(encoder)
        with torch.no_grad():
            found = torch.cat([tower.encode_text([prompt]) for prompt in self.prompts])
        twins = torch.nonzero(torch.triu(torch.cdist(found.double(), found.double()) < _SAME**0.5, diagonal=1))
        if len(twins):
            first, second = (self.prompts[row] for row in twins[0].tolist())
            raise PlanError(f"{encoder.name} reads {first!r} and {second!r} as the same text: leave one of them out")
        return found

    def targets(self, encoder: Encoder) -> list[Target]:
        """See `Sources`."""
        of_texts = zip(self.texts, self.prompts, self.embeddings(encoder), strict=True)
        return [Target(text, embedding, None, prompt) for text, prompt, embedding in of_texts]


def require_text_towers(names: Sequence[str], sources: TextSources, *, precision: Precision, device: str) -> None:
    """Find out before any work whether all encoders read text, and tell the prompts apart.

    Raises:
        PlanError: some do not: names all of them, and why.
        PerceptionError: an encoder cannot be loaded.
    """
    from perception import load_encoder

    reasons = []
    for name in names:
        encoder = load_encoder(name, precision=precision, device=device)
        try:
            _text_tower(encoder)
        except PlanError as error:
            reasons.append(str(error))
        else:
            sources.embeddings(encoder)
    if reasons:
        raise PlanError(
            f"text inversion needs encoders with a text tower, {len(reasons)} of {len(names)} have none: "
            + "; ".join(reasons)
        )


def _text_tower(encoder: Encoder) -> TextEncoder:
    try:
        tower = getattr(encoder, "text", None)
    except CheckpointError as error:
        raise PlanError(f"{encoder.name} cannot read text: {error}") from error
    if tower is None:
        raise PlanError(f"{encoder.name} cannot read text: it has no text tower")
    found: TextEncoder = tower
    return found


@dataclass(frozen=True)
class Recognition:
    """What one encoder sees in one reconstruction: its 8-bit PNG, prepared as any image is.

    Attributes:
        encoder, text, seed: whose reconstruction.
        judge: the encoder that looks.
        similarity: with the prompt that was inverted, by the judge's own text tower.
        rank: of that prompt among all of the run by similarity with the picture, from 1; ties count against it.
        nearest: the text of the prompt that is most similar.
    """

    encoder: str
    text: str
    seed: int
    judge: str
    similarity: float
    rank: int
    nearest: str


def recognise(records: Sequence[Record], sources: TextSources, store: Store, judge: Encoder) -> Iterator[Recognition]:
    """Show all reconstructions of a run to one encoder.

    Raises:
        RunError: a picture is not there, or damaged.
        PlanError: see `TextSources.embeddings`.
    """
    texts = sources.embeddings(judge)
    for record in records:
        picture = store.picture(record.encoder, record.target, record.seed)
        with torch.no_grad():
            seen = judge.encode(to_pixels([judge.preprocess.apply(picture)]))[0]
        similarities = (texts.to(seen) @ seen).tolist()
        own = similarities[sources.texts.index(record.target)]
        nearest = max(range(len(similarities)), key=similarities.__getitem__)
        rank = sum(value >= own for value in similarities)
        yield Recognition(
            record.encoder, record.target, record.seed, judge.name, round(own, 6), rank, sources.texts[nearest]
        )


@dataclass(frozen=True)
class CrossEntry:
    """How one encoder sees another's reconstructions, over all prompts and seeds.

    Attributes:
        encoder, judge: who made them, who looks.
        count: of reconstructions.
        similarity: mean.
        recognised: how many the judge takes for their own prompt, rank 1.
        mean_rank: from 1; what guesses has `(n + 1) / 2` of n prompts.
    """

    encoder: str
    judge: str
    count: int
    similarity: float
    recognised: int
    mean_rank: float


def cross_table(recognitions: Sequence[Recognition], encoders: Sequence[str]) -> list[CrossEntry]:
    """One entry for each pair of encoders, by rows: who made the pictures, then who looks."""
    entries = []
    for maker in encoders:
        for judge in encoders:
            seen = [found for found in recognitions if (found.encoder, found.judge) == (maker, judge)]
            entries.append(
                CrossEntry(
                    encoder=maker,
                    judge=judge,
                    count=len(seen),
                    similarity=round(sum(found.similarity for found in seen) / len(seen), 6),
                    recognised=sum(found.rank == 1 for found in seen),
                    mean_rank=round(sum(found.rank for found in seen) / len(seen), 6),
                )
            )
    return entries


@dataclass(frozen=True)
class TextResults:
    """What a run of text inversions found.

    Attributes:
        results: one record a reconstruction.
        prompts: how many texts there were to choose from.
        recognitions: each reconstruction under each encoder of the run.
        cross: see `cross_table`.
    """

    results: Results
    prompts: int
    recognitions: tuple[Recognition, ...]
    cross: tuple[CrossEntry, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for results.json."""
        return {**self.results.as_dict(), **self._figures()}

    def _figures(self) -> dict[str, Any]:
        recognitions, cross = ([asdict(value) for value in values] for values in (self.recognitions, self.cross))
        return {"recognitions": recognitions, "cross": cross}

    def write(self, store: Store) -> None:
        """Write results.json."""
        store.write_results({**self.results.plan, **self._figures()}, self.results.records)

    def describe(self) -> str:
        """All similarities, and the cross table, as lines of text."""
        return "\n".join([*self._lines(), "", *self._table()]) + "\n"

    def _lines(self) -> Iterator[str]:
        for record in self.results.records:
            place = (record.encoder, record.target, record.seed)
            ranks = [(r.judge, r.rank) for r in self.recognitions if (r.encoder, r.text, r.seed) == place]
            shown = ", ".join(f"{rank} by {judge}" for judge, rank in ranks)
            yield (
                f"{record.encoder}, {record.target!r}, seed {record.seed}: similarity {record.similarity:.3f} "
                f"(8-bit {record.similarity_8bit:.3f}); rank of the text {shown}"
            )

    def _table(self) -> Iterator[str]:
        judges = list(dict.fromkeys(entry.judge for entry in self.cross))
        first = max(len("reconstructed by"), *map(len, judges))
        width = max(22, *map(len, judges))
        yield f"Mean similarity with the text, and pictures whose text is the nearest of {self.prompts}; columns look:"
        yield "  ".join(["reconstructed by".ljust(first), *(judge.rjust(width) for judge in judges)])
        for maker in judges:
            entries = (entry for entry in self.cross if entry.encoder == maker)
            cells = (f"{e.similarity:.3f}  {e.recognised} of {e.count}".rjust(width) for e in entries)
            yield "  ".join([maker.ljust(first), *cells])


def invert_texts(
    plan: InversionPlan, sources: TextSources, run: Path, *, device: str = "cpu", show: Show | None = None
) -> TextResults:
    """Look for pictures of all texts under all encoders, or go on with a run; then show each to every encoder.

    Args:
        plan: what is asked; usually a `TextPlan`.
        sources: the texts.
        run: run directory; its results.json has the cross table too.
        device: torch device.
        show: told how far it is.

    Raises:
        PlanError: an encoder has no text tower, or reads two texts as the same; nothing has been done then.
        PerceptionError, RunError: see `offline.inversion.run.run_inversion`.
    """
    from perception import load_encoder

    require_text_towers(plan.encoders, sources, precision=plan.precision, device=device)
    results = run_inversion(plan, sources, run, device=device, show=show)
    store = Store(run, plan.encoders, sources.ids)
    recognitions: list[Recognition] = []
    for name in plan.encoders:
        judge = load_encoder(name, precision=plan.precision, device=device)
        recognitions += recognise(results.records, sources, store, judge)
    cross = cross_table(recognitions, plan.encoders)
    found = TextResults(results, len(sources.texts), tuple(recognitions), tuple(cross))
    found.write(store)
    return found
