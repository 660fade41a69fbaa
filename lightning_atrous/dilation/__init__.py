"""À trous: a strided network turned, in place and exactly, into one of a finer output stride.

Where a network gives up a stride, what follows takes its taps at holes (trous) of that width, and every
``k``-th position of the dense map is the map of before. With the same weights, in eval mode, borders too:

    ``dilated(x)[..., ::k, ::k] == strided(x)``,  ``k`` = old stride / new stride.

Sources: Holschneider et al. 1989 (algorithme à trous); Chen et al., DeepLab (arXiv:1412.7062, 1606.00915) and
DeepLabv3 (arXiv:1706.05587, section 3.1). Unlike many implementations, an op that gives up its stride keeps
the dilation of its own input: only what comes after it is dilated.

Two methods reach that. *Dilate* rewrites every op by arithmetic on its attributes. What takes statistics over the map
(squeeze-excite, group norm, attention) then sees a denser map, hence gives other numbers, and is refused unless it is
asked for by name. *Phases* dilates nothing: what gives up its stride takes its map apart into sub-grids, which go on as
further images of the batch. Each is a map as the strided network has it, statistics and attention too. By default the
first of the two is taken that is exact. Where nothing takes statistics the two are one function, borders included, and
*dilate* is computed in the second way where that is faster (`Dilation.execution`).

No family of networks is known here. Every op and every stage is placed by the sizes of the maps it meets in one
run, and the whole is proved on weights drawn at random.
"""

from lightning_atrous.dilation.network import Dilation, Execution, Method
from lightning_atrous.dilation.ops import DilationError
from lightning_atrous.dilation.stride import set_output_stride

__all__ = ["Dilation", "DilationError", "Execution", "Method", "set_output_stride"]
