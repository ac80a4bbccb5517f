"""The eleven data sets of CoOp (arXiv 2109.01134): the folders of their pictures, and the names of their classes.

Templates and names are those of https://github.com/KaiyangZhou/CoOp, so that accuracies can be compared with published
ones. A `split_zhou_*.json` has these names, with underscores for spaces; the rules here derive them from folder names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

PLAIN_TEMPLATE = "a photo of a {}."


def _plain(folder: str) -> str:
    return folder.replace("/", " ")


def _lower(folder: str) -> str:
    return folder.lower()  # american_pit_bull_terrier and Abyssinian: breeds and cats are cased differently


def _year_first(folder: str) -> str:
    *names, year = folder.split(" ")
    return " ".join([year, *names])  # "Audi S4 Sedan 2012" -> "2012 Audi S4 Sedan"


def _camel_case(folder: str) -> str:
    return "_".join(re.findall("[A-Z][^A-Z]*", folder)) or folder  # "ApplyEyeMakeup" -> "Apply_Eye_Makeup"


def _letter_folders(folder: str) -> str:
    _, *names = folder.split("/") if "/" in folder else ("", folder)
    return " ".join(reversed(names))  # "a/apartment_building/outdoor" -> "outdoor apartment_building"


@dataclass(frozen=True)
class DataSet:
    """One row: the folder of the pictures within the data set's, the template, and how folders name classes."""

    image_dir: str
    template: str = PLAIN_TEMPLATE
    rule: Callable[[str], str] = _plain
    renamed: dict[str, str] = field(default_factory=dict)  # before the rule
    ignored: tuple[str, ...] = ()

    def class_name(self, folder: str) -> str:
        """The name of the class whose pictures are in a folder of this name."""
        return self.renamed.get(folder) or self.rule(folder)


DATA_SETS = {
    "imagenet": DataSet("images"),
    "caltech101": DataSet(
        "101_ObjectCategories",
        renamed={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
        ignored=("BACKGROUND_Google", "Faces_easy"),
    ),
    "oxford_pets": DataSet("images", "a photo of a {}, a type of pet.", _lower),
    "stanford_cars": DataSet(".", rule=_year_first),
    "oxford_flowers": DataSet("jpg", "a photo of a {}, a type of flower."),
    "food101": DataSet("images", "a photo of {}, a type of food."),
    "fgvc_aircraft": DataSet("images", "a photo of a {}, a type of aircraft."),
    "sun397": DataSet("SUN397", rule=_letter_folders),
    "dtd": DataSet("images", "{} texture."),
    "eurosat": DataSet(
        "2750",
        "a centered satellite photo of {}.",
        renamed={
            "AnnualCrop": "Annual Crop Land",
            "HerbaceousVegetation": "Herbaceous Vegetation Land",
            "Highway": "Highway or Road",
            "Industrial": "Industrial Buildings",
            "Pasture": "Pasture Land",
            "PermanentCrop": "Permanent Crop Land",
            "Residential": "Residential Buildings",
            "SeaLake": "Sea or Lake",
        },
    ),
    "ucf101": DataSet("UCF-101-midframes", "a photo of a person doing {}.", _camel_case),
}


def describe(class_name: str, template: str) -> str:
    """The text for a class; underscores in names are spaces, as in CoOp.

    Raises:
        ValueError: for a template without `{}`.
    """
    if "{}" not in template:
        raise ValueError(f"The template {template!r} has no {{}} for the name of the class.")
    return template.replace("{}", class_name.replace("_", " "))
