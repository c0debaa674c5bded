"""The pure core: what happened (events), what is so (state), what to do (decide). No clock, file, process or GPU."""
