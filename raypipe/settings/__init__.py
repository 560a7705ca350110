"""The sections of a configuration, a model each; `raypipe.config` puts them together and reads them."""
