"""Try strategies on the seed set, in small trainings, before lists of the whole source are cut."""
