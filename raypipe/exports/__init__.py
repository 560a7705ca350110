"""Write the samples of a keep-list in the formats that training code reads."""
