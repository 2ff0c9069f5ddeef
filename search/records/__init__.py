"""Records of a sweep: its ledger, its trials, its front."""
