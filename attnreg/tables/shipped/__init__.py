"""The tables that come with attnreg, one for each class of devices; ``attnreg.tuning.store`` reads them."""
