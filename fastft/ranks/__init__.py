"""Ranks: the environment -> a `World` that agrees on what happens next.

To be read in this order:

    world.py     which rank this is, and the few figures that ranks tell each other: `World`, `ALONE`, `joined`,
                 `world_of`, `group_of_one`
    stopping.py  how a run is asked to stop, or to save: `stop_requests`, `StopRequest`, `save_is_asked`
    watch.py     ranks that hang, and ranks that lag: `Watchdog`, `Stragglers`
"""
