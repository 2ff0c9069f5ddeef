"""What has happened in a sweep: its ledger, its trials, its front."""
