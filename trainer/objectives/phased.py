"""Phased rectification: within windows of time, the teacher couples data and noise in training."""

from torch import Tensor

from models.denoiser import prediction_of
from models.interpolant import Interpolant
from models.prediction import Prediction
from models.sampler import DenoiserLike, window_edges
from models.windows import Piecewise, WindowNoise, sample_window
from trainer.objectives.base import Loss, Objective
from trainer.objectives.matching import Matching
from trainer.objectives.parts.distances import Distance
from trainer.objectives.parts.time_distributions import TimeDistribution
from trainer.objectives.parts.weightings import Weighting
from trainer.objectives.teachers import FrozenTeacher, ddim_between
from trainer.step_random import StepRandom, draw_stratified


class Phased(Objective):
    """`Matching` within windows of time, from data and fresh noise; no pairs are stored.

    Wang et al. 2024 (arXiv 2410.07303), Yan et al. 2024 (arXiv 2405.07510).

    In a window from its noisy end s to its clean end e, the teacher carries x_s = mix(x, eps, s)
    to x_e. The line through the two states has the ends (x', eps'), which the student matches at
    a t in (e, s). DDIM with one step per window, on the windows' edges, then draws the teacher's
    samples.

    A student on the teacher's interpolant learns the first-order trajectories of Rectified
    Diffusion. A student on `Piecewise` learns PeRFlow's, with the prediction Velocity (its
    velocity), NoisePrediction (ddim_eps) or WindowNoise (diff_eps). A two-time student learns
    steps to e.

    Args:
        teacher: the frozen teacher.
        windows: number of equal windows, or their edges, falling from 1 to 0.
        steps: DDIM steps of the teacher from one end of a window to the other.
        times: distribution of the position of t in its window, 0 at its clean end.
        measure: prediction in which the error is measured; by default what the network predicts
            (Velocity for an analytic denoiser).
        weighting: weight of each noise level; by default all errors of `measure` count the same.
        distance: of the errors; squared by default.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        windows: int | list[float] = 4,
        steps: int = 10,
        times: TimeDistribution | None = None,
        measure: Prediction | None = None,
        weighting: Weighting | None = None,
        distance: Distance | None = None,
    ):
        if steps < 1:
            raise ValueError(f"Phased: steps is {steps}; it must be at least 1")
        self.teacher = teacher
        self.edges = window_edges(windows, "Phased: windows")
        self.steps = steps
        self.matching = Matching(times, measure, weighting, distance)

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        self._check_windows(denoiser)
        interpolant = self._teacher_interpolant(denoiser)

        # 1. A window for each sample, and the state at its noisy end.
        window = sample_window(draw_stratified(random, "time", x), self.edges)
        s = window.s
        e = window.e
        x_s = interpolant.mix(x, eps, s)

        # 2. The teacher's state at the clean end, and the ends of the line through both states.
        teacher = self.teacher.for_student(denoiser, x, interpolant)
        x_e = ddim_between(teacher, x_s, s, e, cond, self.steps)
        x_line, eps_line = interpolant.solve_pair(x_s, s, x_e, e)

        # 3. Matching at a time inside the window.
        times = self.matching.times.for_shape(x.shape)
        t = e + (s - e) * times(window.u)
        return self.matching.loss_at(denoiser, x_line, eps_line, t, cond, e)

    def _check_windows(self, denoiser: DenoiserLike) -> None:
        """Check that the student's interpolant and predictions have these windows, if any."""
        for part in (denoiser.interpolant, prediction_of(denoiser), self.matching.measure):
            if not isinstance(part, Piecewise | WindowNoise):
                continue
            edges = window_edges(part.windows)
            if edges != self.edges:
                raise ValueError(
                    f"Phased: windows are {self.edges}, those of {part!r} are {edges}; make them "
                    "equal"
                )

    def _teacher_interpolant(self, denoiser: DenoiserLike) -> Interpolant:
        """Return the interpolant that the teacher must have: the student's, without windows."""
        interpolant = denoiser.interpolant
        return interpolant.interpolant if isinstance(interpolant, Piecewise) else interpolant
