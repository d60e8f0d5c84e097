"""How strongly an expert wants to change: squared gradient norms, with and without backpropagation (section 6)."""

from fluxlib.gradients.exact import true_norms
from fluxlib.gradients.probes import probe_cost, probe_norms
from fluxlib.gradients.quality import quality
