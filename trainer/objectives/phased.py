"""Phased rectification: windows of time, inside each of which the frozen teacher couples data and noise, online."""

from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction
from models.sampler import DenoiserLike, edges
from models.windows import Piecewise, drawn
from trainer.draws import Draws, uniform
from trainer.errors import Error
from trainer.objectives.base import Objective
from trainer.objectives.frozen import Frozen, carry
from trainer.objectives.matching import Matching
from trainer.times import Times
from trainer.weights import Weight


class Phased(Objective):
    """`Matching` in windows, from real data and fresh noise; no pairs are stored (2410.07303, 2405.07510).

    In a window from its noisy end s to its clean end e the teacher carries x_s = mix(x, eps, s) to x_e; the chord through the
    two has the ends (x', eps'), which are matched at t in (e, s). As many DDIM steps as there are windows, on their edges,
    then draw what the teacher draws. A student on the teacher's own interpolant learns Rectified Diffusion's first-order
    form; one on `Piecewise` learns PeRFlow's, with the prediction Velocity (velocity), Noise (ddim_eps) or WindowNoise
    (diff_eps). A student that jumps is asked for jumps to e.

    Args:
        teacher: the frozen teacher.
        windows: how many equal ones, or their edges, falling from 1 to 0.
        steps: DDIM steps of the teacher from one end of a window to the other.
        times: law of the place of t inside a window, 0 its clean end.
        measure: row in which the error is measured; by default what the network predicts (Velocity for an analytic denoiser).
        weight: of each noise level; by default every error counts alike in the row that measures it.
        error: squared, by default, or pseudo-Huber.
    """

    def __init__(
        self,
        teacher: Frozen,
        windows: int | list[float] = 4,
        steps: int = 10,
        times: Times | None = None,
        measure: Prediction | None = None,
        weight: Weight | None = None,
        error: Error | None = None,
    ):
        if steps < 1:
            raise ValueError(f"Phased: steps is {steps}, it must be at least 1")
        self.teacher, self.edges, self.steps = teacher, edges(windows, "Phased: windows"), steps
        self.matching = Matching(times, measure, weight, error)

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        own = self._own(denoiser)
        _, s, e, place = drawn(uniform(draws, "time", x), self.edges)
        x_s = own.mix(x, eps, s)
        x_e = carry(self.teacher.on(denoiser, x, own), x_s, s, e, cond, self.steps)
        x, eps = own.unmix(x_s, s, x_e, e)
        loss = self.matching.at(denoiser, x, eps, e + (s - e) * self.matching.times(place), cond, e)
        self.seen = self.matching.seen
        return loss

    def _own(self, denoiser: DenoiserLike) -> Interpolant:
        """Return the teacher's interpolant, which is the student's own but for students whose states are straight in windows."""
        own: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        for part in (own, getattr(denoiser, "prediction", None), self.matching.measure):
            theirs = getattr(part, "windows", None)
            if theirs is not None and edges(theirs) != self.edges:
                raise ValueError(f"Phased: windows are {self.edges}, those of {part!r} {edges(theirs)}; make them equal")
        return own.interpolant if isinstance(own, Piecewise) else own
