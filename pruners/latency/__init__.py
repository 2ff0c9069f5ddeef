"""Time measured on a device, and the schedules that follow from it."""
