"""What large sizes need: the contrastive loss of large or shared batches in chunks, and top-k of large galleries."""
