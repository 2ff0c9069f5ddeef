"""The pruning methods: one file each, named as the method is named everywhere."""
