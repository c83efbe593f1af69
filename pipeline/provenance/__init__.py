"""What a stored image says of itself: rights in its XMP and, with a certificate, signed Content Credentials."""
