"""What people touch and watch: live progress of a run, and the dashboard of ``notebooks/explore.ipynb``.

- :mod:`fluxlib.app.widgets.monitor` -- a line per round and a growing curve, in any notebook
- :mod:`fluxlib.app.widgets.preview` -- what a configuration would do, before it is run
- :mod:`fluxlib.app.widgets.forecast` -- the memory, work and time of it
- :mod:`fluxlib.app.widgets.background` -- a run in a thread: watched, stopped, gone on with
- :mod:`fluxlib.app.widgets.controls` -- sliders and menus, and the configuration that they stand for
- :mod:`fluxlib.app.widgets.history` -- earlier runs in the store, to choose from
- :mod:`fluxlib.app.widgets.wording` -- what is said of a run, as HTML
- :mod:`fluxlib.app.widgets.dashboard` -- all of it in one place
"""

from fluxlib.app.widgets.background import BackgroundRun
from fluxlib.app.widgets.dashboard import Dashboard
from fluxlib.app.widgets.monitor import HEADLESS, RunMonitor, in_notebook
from fluxlib.app.widgets.preview import Preview, preview

__all__ = ["HEADLESS", "BackgroundRun", "Dashboard", "Preview", "RunMonitor", "in_notebook", "preview"]
