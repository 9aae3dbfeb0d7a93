"""Who carries out a release's variants: this process, others on this machine, or another machine."""
