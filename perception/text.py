"""The CLIP text tower: prompts in, unit embeddings out, in the space of the image tower."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from perception.encoder import unit_embeddings

Tokenizer = Callable[[list[str]], Tensor]


class TextEncoder(nn.Module):
    """Encodes prompts; built by `ClipEncoder.text`."""

    def __init__(self, tower: nn.Module, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts; longer ones are cut at the context length, as CLIP does.

        Args:
            prompts: n strings, none of them blank.

        Returns:
            (n, d) float32 of unit L2 norm.

        Raises:
            ValueError: no prompts, or a blank one.
            NonFiniteEmbedding: the tower returned NaN, infinity or zero.
        """
        if not prompts or not all(p.strip() for p in prompts):
            raise ValueError("prompts must be a non-empty list of non-blank strings")
        device = next(self.tower.parameters()).device
        return unit_embeddings(self.tower(self.tokenizer(list(prompts)).to(device)))


def class_embeddings(text: TextEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Zero-shot classifier: the normalised mean of a class's normalised template embeddings (methods 6.9).

    Args:
        names: n class names.
        templates: prompts with one `{}` each.

    Returns:
        (n, d) float32 of unit L2 norm.
    """
    with torch.inference_mode():
        rows = [text.encode_text([t.format(name) for t in templates]).mean(0) for name in names]
        return unit_embeddings(torch.stack(rows))
