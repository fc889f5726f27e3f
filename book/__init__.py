"""The book's chapters, results and small checkpoints; installed as `sslbook.book`."""
