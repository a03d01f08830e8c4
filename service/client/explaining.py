"""Why an image has its verdict."""

from collections.abc import Sequence

from service.client.calls import Call, explain_call
from service.client.images import Named, Source, load_named
from service.client.parts import Part, WayT, asked
from service.wire_explain import ExplainAnswer


class Explaining(Part[WayT]):
    """Holds `explain`, which both clients have as their own."""

    @asked
    def explain(
        self, image: Source | Named, against: Sequence[str] = (), *, attribute: bool = True, k: int | None = None
    ) -> Call[ExplainAnswer]:
        """Ask why an image has its verdict, and which parts of it make it similar to exemplars.

        Needs the scope `review`.

        Args:
            image: one, as of `classify`.
            against: ids of up to two exemplars to compare it with; by default the most similar one of the pool that
                won, and of the runner-up.
            attribute: False for the decision alone, which takes no longer than a verdict.
            k: neighbours of each pool to show.

        Raises:
            ImageUnreadable: the image cannot be read here.
            ConnectionFailed, AnswerNotUnderstood, ProblemError: no answer; NotFound where an exemplar is not there.
            TypeError, ValueError: an argument that is not of these.
        """
        loaded = load_named(image, 0, self.carrier.max_image_bytes)
        return explain_call(loaded, against, attribute=attribute, k=k)
