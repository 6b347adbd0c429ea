"""A sweep as a study: runs paired by seed and data order, differences with intervals, curves, a record and a page."""
