"""Small pictures of images, where the service keeps some."""

from service.client.calls import Call, Content, path_of
from service.client.parts import Part, Steps, WayT, ask, stepped


class KeptImages(Part[WayT]):
    """What images look like that are in the review queue, or are exemplars. Needs the scope `review` or `pools:write`.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError: NotFound where no picture is kept, which is so of
    all images unless the operator has turned that on.
    """

    @stepped
    def get(self, sha256: str) -> Steps[bytes]:
        """A picture, at most 512 pixels wide and high: the bytes of a JPEG file.

        Args:
            sha256: of the image file, 64 lower-case hex digits.
        """
        found = yield from ask(Call("GET", path_of("images", sha256), Content, media_type="image/jpeg"))
        return found.content
