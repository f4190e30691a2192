"""What both ends of HTTP/2 share, clients' and providers': headers, coded and checked."""
