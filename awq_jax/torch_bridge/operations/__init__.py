"""What each operation of torch is in JAX: a file a kind, all in one table."""

from awq_jax.torch_bridge.operations import attention as attention
from awq_jax.torch_bridge.operations import complexes as complexes
from awq_jax.torch_bridge.operations import creation as creation
from awq_jax.torch_bridge.operations import elementwise as elementwise
from awq_jax.torch_bridge.operations import experts as experts
from awq_jax.torch_bridge.operations import indexing as indexing
from awq_jax.torch_bridge.operations import matmul as matmul
from awq_jax.torch_bridge.operations import norms as norms
from awq_jax.torch_bridge.operations import pooling as pooling
from awq_jax.torch_bridge.operations import reductions as reductions
from awq_jax.torch_bridge.operations import shapes as shapes
from awq_jax.torch_bridge.operations import sorting as sorting
