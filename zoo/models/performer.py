"""Performer: softmax attention by positive random features, FAVOR+ (Choromanski et al. 2020, arXiv 2009.14794).

exp(q . k) is the mean over w ~ N(0, I) of exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2) (lemma 1), so m features of
each make attention linear in length. Its mean squared error at one pair is
(1/m) exp(|q + k|^2) exp(q . k)^2 (1 - exp(-|q + k|^2)) (lemma 2), and less where the w are orthogonal (theorem 2):
large queries and keys need many features.
"""

import torch
from transformers import initialization as init

from .linear_attention import LinearAttention


class Performer(LinearAttention):
    """Softmax attention estimated by positive orthogonal random features (FAVOR+, arXiv 2009.14794, section 2).

    `features`: how many (256). `orthogonal`: in blocks of head_dim (true). `redraw`: training steps after which new
    ones are drawn, by zoo train (none); in a loop of your own call `redraw_features` of the model.
    """

    projection: torch.Tensor

    def __init__(self, *place, features: int = 256, orthogonal: bool = True, redraw: int | None = None):
        super().__init__(*place)
        # redraw is for whoever counts the steps, and reads it in the config
        self.count, self.orthogonal = features, orthogonal
        # saved with the model: other features are another model
        self.register_buffer("projection", torch.empty(features, self.head_dim))

    @staticmethod
    def check(config, features: int = 256, orthogonal: bool = True, redraw: int | None = None) -> None:
        for name, value in (("features", features), ("redraw", redraw)):
            if (name, value) != ("redraw", None) and (type(value) is not int or value < 1):
                raise ValueError(f"attention_kwargs: performer.{name} is a whole number of at least 1, not {value!r}.")
        if type(orthogonal) is not bool:
            raise ValueError(f"attention_kwargs: performer.orthogonal is true or false, not {orthogonal!r}.")

    def initialise(self) -> None:
        init.copy_(self.projection, random_directions(self.count, self.head_dim, self.orthogonal).to(self.projection))

    @torch.no_grad()
    def redraw_features(self) -> None:
        """New ones, from torch's default generator."""
        drawn = random_directions(self.count, self.head_dim, self.orthogonal)
        self.projection.copy_(drawn.to(self.projection))

    def features(self, states: torch.Tensor, of_queries: bool) -> torch.Tensor:
        exponents = states @ self.projection.to(states.dtype).T - states.square().sum(-1, keepdim=True) / 2
        # a factor of one query, or of all keys, is in numerator and denominator; in causal attention the largest key
        # may be one to come, so keys keep theirs
        if of_queries:
            exponents = exponents - exponents.amax(-1, keepdim=True).detach()
        elif not self.is_causal:
            exponents = exponents - exponents.amax((-2, -1), keepdim=True).detach()
        return exponents.exp() * self.count**-0.5


def random_directions(count: int, width: int, orthogonal: bool = True) -> torch.Tensor:
    """(count, width): each row N(0, I); orthogonal: the rows of each block of `width` are, their norms still chi."""
    # a model that is made in 16 bits makes them the default, of which there is no QR
    drawn = torch.randn(count, width, dtype=torch.float32)
    if not orthogonal:
        return drawn
    blocks = []
    for _ in range(-(-count // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.float32))
        # without the signs of r it would not be uniform (Mezzadri 2007, arXiv math-ph/0609050)
        blocks.append((q * r.diagonal().sign()).T)
    return torch.cat(blocks)[:count] * drawn.norm(dim=1, keepdim=True)
