"""The facts of the sample world: plain tables, and the same tables unrolled to facts.

One idea: a fact is a dict of slots, `{"country": "France", "city": "Paris", "continent": "Europe"}`.
How facts are said and asked stands in `nanochat.sample_phrases`; documents are drawn from both by
`nanochat.sample_world`. The tables are small on purpose: about a thousand facts, so that a model that
reads two million tokens meets each of them dozens of times.
"""

from __future__ import annotations

# -----------------------------------------------------------------------------
# Tables

CAPITALS = {
    "Europe": {
        "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
        "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
        "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens",
        "Belgium": "Brussels", "Switzerland": "Bern", "Russia": "Moscow", "Ukraine": "Kyiv", "Romania": "Bucharest",
        "Bulgaria": "Sofia", "Croatia": "Zagreb", "Iceland": "Reykjavik", "Scotland": "Edinburgh",
    },
    "Asia": {
        "China": "Beijing", "Japan": "Tokyo", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi",
        "Iran": "Tehran", "Iraq": "Baghdad", "Nepal": "Kathmandu", "Pakistan": "Islamabad", "Jordan": "Amman",
        "Lebanon": "Beirut", "Syria": "Damascus", "Qatar": "Doha", "South Korea": "Seoul",
    },
    "Africa": {
        "Egypt": "Cairo", "Kenya": "Nairobi", "Nigeria": "Abuja", "Ghana": "Accra", "Morocco": "Rabat",
        "Senegal": "Dakar", "Uganda": "Kampala", "Sudan": "Khartoum", "Zambia": "Lusaka",
    },
    "North America": {"Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Jamaica": "Kingston"},
    "South America": {
        "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Chile": "Santiago", "Peru": "Lima",
        "Colombia": "Bogota", "Ecuador": "Quito", "Uruguay": "Montevideo",
    },
    "Oceania": {"Australia": "Canberra", "New Zealand": "Wellington", "Fiji": "Suva"},
}

ELEMENTS = {
    "hydrogen": "H", "helium": "He", "lithium": "Li", "beryllium": "Be", "boron": "B", "carbon": "C",
    "nitrogen": "N", "oxygen": "O", "fluorine": "F", "neon": "Ne", "sodium": "Na", "magnesium": "Mg",
    "aluminium": "Al", "silicon": "Si", "phosphorus": "P", "sulfur": "S", "chlorine": "Cl", "argon": "Ar",
    "potassium": "K", "calcium": "Ca", "titanium": "Ti", "chromium": "Cr", "manganese": "Mn", "iron": "Fe",
    "cobalt": "Co", "nickel": "Ni", "copper": "Cu", "zinc": "Zn", "bromine": "Br", "krypton": "Kr", "silver": "Ag",
    "tin": "Sn", "barium": "Ba", "tungsten": "W", "platinum": "Pt", "gold": "Au", "mercury": "Hg", "lead": "Pb",
    "radium": "Ra", "uranium": "U",
}

PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June",
          "July", "August", "September", "October", "November", "December"]

LISTS = {
    "planets of the solar system": PLANETS,
    "days of the week": DAYS,
    "months of the year": MONTHS,
    "seasons of the year": ["spring", "summer", "autumn", "winter"],
    "colours of the rainbow": ["red", "orange", "yellow", "green", "blue", "indigo", "violet"],
    "vowels of the alphabet": ["a", "e", "i", "o", "u"],
    "points of the compass": ["north", "east", "south", "west"],
    "fingers of the hand": ["thumb", "index finger", "middle finger", "ring finger", "little finger"],
}

# Each word stands in one pair only, so that "the opposite of" has one answer.
OPPOSITES = """
    hot cold, big small, up down, old young, happy sad, fast slow, high low, long short, light dark, day night,
    wet dry, full empty, rich poor, strong weak, hard soft, open closed, early late, loud quiet, clean dirty,
    near far, good bad, left right, black white, thick thin, wide narrow, deep shallow, heavy weightless, sweet sour,
    new ancient, true false, love hate, friend enemy, begin end, win lose, push pull, buy sell, give take, come go,
    laugh cry, remember forget, arrive depart, inside outside, above below, before after, always never,
    everything nothing, more less, many few, first last, front back, top bottom, summer winter, north south, east west,
    king queen, man woman, boy girl, war peace, life death, brave cowardly, kind cruel, lazy busy, safe dangerous,
    smooth rough, sharp blunt, simple complicated, cheap expensive, ugly beautiful, asleep awake, question answer,
    guilty innocent, rude polite, tight loose, fresh stale, male female, sunrise sunset
"""

# animal: (sound, home, young one)
ANIMALS = {
    "dog": ("barks", "kennel", "puppy"), "cat": ("meows", "basket", "kitten"), "cow": ("moos", "barn", "calf"),
    "horse": ("neighs", "stable", "foal"), "sheep": ("bleats", "fold", "lamb"), "pig": ("oinks", "sty", "piglet"),
    "duck": ("quacks", "pond", "duckling"), "hen": ("clucks", "coop", "chick"), "lion": ("roars", "den", "cub"),
    "bee": ("buzzes", "hive", "larva"), "frog": ("croaks", "swamp", "tadpole"), "goose": ("honks", "marsh", "gosling"),
    "wolf": ("howls", "lair", "pup"), "mouse": ("squeaks", "hole", "pinky"), "elephant": ("trumpets", "jungle", "calf"),
    "deer": ("bells", "forest", "fawn"), "sparrow": ("chirps", "nest", "nestling"),
    "snake": ("hisses", "pit", "snakelet"),
}

COLOURS = {
    "green": "grass, a frog, an emerald, a leaf, a cucumber", "white": "snow, milk, a swan, salt",
    "red": "blood, a tomato, a ruby, a strawberry, a cherry", "yellow": "a lemon, a banana, the sun, butter",
    "blue": "the sky, the sea, a sapphire", "black": "coal, a raven, tar", "orange": "a carrot, a pumpkin",
    "brown": "chocolate, a chestnut, coffee", "grey": "an elephant, ash, a mouse", "pink": "a flamingo, a pig",
    "purple": "a plum, an aubergine",
}

# whole: (number, parts)
UNITS = {
    "a minute": ("60", "seconds"), "an hour": ("60", "minutes"), "a day": ("24", "hours"), "a week": ("7", "days"),
    "a year": ("12", "months"), "a decade": ("10", "years"), "a century": ("100", "years"),
    "a millennium": ("1000", "years"), "a metre": ("100", "centimetres"), "a centimetre": ("10", "millimetres"),
    "a kilometre": ("1000", "metres"), "a kilogram": ("1000", "grams"), "a tonne": ("1000", "kilograms"),
    "a litre": ("1000", "millilitres"), "a foot": ("12", "inches"), "a yard": ("3", "feet"), "a byte": ("8", "bits"),
    "a dollar": ("100", "cents"), "a pound": ("16", "ounces"), "a gallon": ("4", "quarts"),
}

PLURALS = {
    "child": "children", "mouse": "mice", "foot": "feet", "tooth": "teeth", "goose": "geese", "man": "men",
    "woman": "women", "ox": "oxen", "person": "people", "leaf": "leaves", "wolf": "wolves", "knife": "knives",
    "wife": "wives", "life": "lives", "half": "halves", "shelf": "shelves", "thief": "thieves", "loaf": "loaves",
    "calf": "calves", "potato": "potatoes", "tomato": "tomatoes", "hero": "heroes", "echo": "echoes", "city": "cities",
    "baby": "babies", "lady": "ladies", "story": "stories", "party": "parties", "country": "countries", "box": "boxes",
    "fox": "foxes", "bus": "buses", "church": "churches", "dish": "dishes", "glass": "glasses", "book": "books",
    "tree": "trees", "cactus": "cacti", "penny": "pence", "louse": "lice",
}

JOBS = {
    "baker": "bakes bread", "teacher": "teaches children", "farmer": "grows crops", "doctor": "treats the sick",
    "pilot": "flies planes", "sailor": "sails ships", "cook": "prepares meals", "tailor": "sews clothes",
    "painter": "paints pictures", "carpenter": "works with wood", "dentist": "looks after teeth",
    "plumber": "mends pipes", "fisherman": "catches fish", "writer": "writes books", "singer": "sings songs",
    "butcher": "sells meat", "miner": "digs coal", "gardener": "plants flowers", "shepherd": "watches sheep",
    "barber": "cuts hair", "potter": "makes pots", "firefighter": "puts out fires", "blacksmith": "shoes horses",
    "librarian": "lends books",
}

# How the people of the stories are called, where they go and what they carry.
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Nora Oscar Paula Rosa Sam Tom Zoe".split()
PLACES = "the market, the river, the school, the garden, the old mill, the beach, the station, the hill".split(", ")
THINGS = "ball, kite, hat, boat, box, scarf, lamp, bag, cup, pencil, drum, ribbon".split(", ")
FOODS = "apple, bread, carrot, egg, grape, honey, jam, lemon, melon, nut, pear, rice, soup, tomato".split(", ")


# -----------------------------------------------------------------------------
# The tables unrolled to facts


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def neighbours(cycle: list[str], *slots: str) -> list[dict[str, str]]:
    """Each run of consecutive members of a cycle, named by `slots`: 7 facts for the days of the week."""
    return [
        {slot: cycle[(start + offset) % len(cycle)] for offset, slot in enumerate(slots)} for start in range(len(cycle))
    ]


COUNTRY_FACTS = [
    {"country": country, "city": city, "continent": continent}
    for continent, capitals in CAPITALS.items()
    for country, city in capitals.items()
]
ELEMENT_FACTS = [{"element": element, "symbol": symbol} for element, symbol in ELEMENTS.items()]
PLANET_FACTS = [{"planet": planet, "ordinal": ordinal} for planet, ordinal in zip(PLANETS, ORDINALS)]
ANIMAL_FACTS = [
    {"animal": with_article(animal), "sound": sound, "home": home, "young": young}
    for animal, (sound, home, young) in ANIMALS.items()
]
OPPOSITE_FACTS = [
    {"word": word, "opposite": opposite}
    for pair in OPPOSITES.split(",")
    for word, opposite in (pair.split(), reversed(pair.split()))
]
COLOUR_FACTS = [
    {"thing": thing, "colour": colour} for colour, things in COLOURS.items() for thing in things.split(", ")
]
UNIT_FACTS = [{"whole": whole, "number": number, "parts": parts} for whole, (number, parts) in UNITS.items()]
PLURAL_FACTS = [{"singular": singular, "plural": plural} for singular, plural in PLURALS.items()]
JOB_FACTS = [{"job": job, "work": work} for job, work in JOBS.items()]
LIST_FACTS = [{"list": name, "members": ", ".join(members)} for name, members in LISTS.items()]
DIGITS = range(1, 10)
SUMS = [{"a": str(a), "b": str(b), "c": str(a + b)} for a in DIGITS for b in DIGITS]
DIFFERENCES = [{"a": str(a + b), "b": str(b), "c": str(a)} for a in DIGITS for b in DIGITS]
PRODUCTS = [{"a": str(a), "b": str(b), "c": str(a * b)} for a in DIGITS for b in DIGITS]
# A small closed range, so that each equation is met dozens of times.
EQUATIONS = [
    {"equation": f"{a}*x + {b} = {a * x + b}", "a": str(a), "b": str(b), "ax": str(a * x), "x": str(x)}
    for a in range(2, 7)
    for x in range(1, 7)
    for b in range(1, 6)
]
