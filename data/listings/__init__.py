"""Listings: the images that `rectify pack` reads, with their classes and captions, of any source.

One file for each source: a folder of images, a list (CSV, JSON lines, parquet), webdataset tars.
"""

from data.listings.listing import Listing, ListingOptions
from data.listings.sources import list_images

__all__ = ["Listing", "ListingOptions", "list_images"]
