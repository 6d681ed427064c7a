"""What crosses between server and clients: records, codecs, arrays read with distrust, and Flower's own inside."""
