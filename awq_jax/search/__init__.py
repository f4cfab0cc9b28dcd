"""How a weight is changed before and while it is rounded: one strategy a file, each a pure function of one matrix.

  scale     (w, moments, spec) -> s                            which input channels to enlarge
  clip      (w, moments, spec) -> (low, high)                  which range each group covers
  rounding  (w, low, high, moments, spec) -> (q, step, zero)   which code each weight gets

w is (i, o), moments are those of its input, s is (i,); low, high, step, zero are (groups, o); q is (groups, g, o).
A recipe names one of each. `find_scale` runs the first, and falls back to no scale where rounding to nearest is better
off without it; `solve` runs the others on `w * s` and the moments of `x / s`.
"""

from awq_jax.search.clip.importance import Importance as Importance
from awq_jax.search.clip.learned import LearnedClip as LearnedClip
from awq_jax.search.clip.shrink import Clip as Clip
from awq_jax.search.clip.shrink import no_clip as no_clip
from awq_jax.search.rounding.feedback import Feedback as Feedback
from awq_jax.search.rounding.feedback import to_nearest as to_nearest
from awq_jax.search.rounding.signed import Signed as Signed
from awq_jax.search.scale.feedback_grid import FeedbackGrid as FeedbackGrid
from awq_jax.search.scale.golden import Golden as Golden
from awq_jax.search.scale.gradient import Gradient as Gradient
from awq_jax.search.scale.grid import Grid as Grid
from awq_jax.search.scale.joint import Joint as Joint
from awq_jax.search.solve import solve as solve
