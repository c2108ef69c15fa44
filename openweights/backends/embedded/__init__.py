"""The parts of the store on this machine; `openweights.backends.local` puts them together."""
