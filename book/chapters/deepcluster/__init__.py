"""DeepCluster and DeepCluster v2, which predict the clusters of their own features."""
