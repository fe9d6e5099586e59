"""Studies: one recipe under several settings and seeds, and what came of them (`hf-fsam compare`)."""
