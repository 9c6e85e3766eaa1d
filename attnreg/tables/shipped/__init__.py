"""The tables that come with attnreg, for every CPU, and for every GPU of a compute capability; ``store`` reads them."""
