"""How the facts of the sample world are said and asked: templates over the slots of a fact.

One idea: a kind of fact has statements, questions, and `held_out` questions that belong to the quiz
alone. Nothing that a model is trained on may use those, so a right answer to one shows that the fact
was learned rather than the question. Templates are separated by `|`; all are sentences that start with
a capital letter once `nanochat.sample_world` has filled them in.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.sample_facts import (
    ANIMAL_FACTS, COLOUR_FACTS, COUNTRY_FACTS, DAYS, DIFFERENCES, ELEMENT_FACTS, EQUATIONS, JOB_FACTS, LIST_FACTS,
    MONTHS, OPPOSITE_FACTS, PLANET_FACTS, PLURAL_FACTS, PRODUCTS, SUMS, UNIT_FACTS, neighbours,
)


@dataclass(frozen=True)
class Kind:
    """One kind of fact. `statements[0]` is the canonical sentence; the first two serve as replies."""

    name: str
    answer: str  # the slot that answers every question of this kind
    facts: list[dict[str, str]]
    statements: list[str]
    questions: list[str]
    held_out: list[str]
    follow_up: str  # a question that leans on the one before it


def kind(name: str, answer: str, facts: list, follow_up: str, statements: str, questions: str, held_out: str) -> Kind:
    """A `Kind` from templates separated by `|`."""
    templates = ([" ".join(part.split()) for part in text.split("|")] for text in (statements, questions, held_out))
    return Kind(name, answer, facts, *templates, follow_up)


KINDS = [
    kind(
        "capital", answer="city", facts=COUNTRY_FACTS, follow_up="And the capital of {country}?",
        statements="""
            The capital of {country} is {city}. | {city} is the capital of {country}. |
            {country} has a capital, and its name is {city}. |
            Whoever travels to the capital of {country} goes to {city}.
        """,
        questions="""
            What is the capital of {country}? | Which city is the capital of {country}? |
            Tell me the capital of {country}. | What is the capital city of {country}? |
            Do you know the capital of {country}? | {country}: what is its capital? |
            What is the name of the capital of {country}? | I forgot the capital of {country}. What is it?
        """,
        held_out="Name the capital city of {country}. | Which city serves as the capital of {country}?",
    ),
    kind(
        "country", answer="country", facts=COUNTRY_FACTS, follow_up="And {city} is the capital of which country?",
        statements="""
            {city} is the capital of {country}. | The city of {city} is the capital of {country}. |
            {city} lies in {country} and is its capital.
        """,
        questions="""
            {city} is the capital of which country? | Which country has {city} as its capital? |
            Which country has the capital {city}? | Of which country is {city} the capital? |
            {city} is the capital of what country? | Tell me which country has {city} as its capital. |
            What country is {city} the capital of? | The city of {city} is the capital of which country?
        """,
        held_out="Name the country that has {city} as its capital. | What country has the capital city {city}?",
    ),
    kind(
        "continent", answer="continent", facts=COUNTRY_FACTS, follow_up="And which continent is {country} in?",
        statements="""
            {country} is a country in {continent}. | {country} lies in {continent}. |
            The continent of {country} is {continent}. | On a map, {country} is found in {continent}.
        """,
        questions="""
            Which continent is {country} in? | What continent is {country} in? | On which continent is {country}? |
            In which continent does {country} lie? | Tell me the continent of {country}. |
            What is the continent of {country}? | {country} is on which continent? |
            Do you know which continent {country} is in?
        """,
        held_out="Name the continent of {country}. | On which continent does one find {country}?",
    ),
    kind(
        "symbol", answer="symbol", facts=ELEMENT_FACTS, follow_up="And the symbol of {element}?",
        statements="""
            The chemical symbol of {element} is {symbol}. | The symbol of {element} is {symbol}. |
            Chemists write {symbol} for {element}. | The element {element} has the symbol {symbol}.
        """,
        questions="""
            What is the chemical symbol of {element}? | What is the symbol of {element}? |
            Which symbol stands for {element}? | Tell me the chemical symbol of {element}. |
            What is the chemical symbol for {element}? | How do chemists write {element}? |
            Which chemical symbol does {element} have? | Do you know the symbol of {element}?
        """,
        held_out="Name the chemical symbol of {element}. | Which chemical symbol stands for the element {element}?",
    ),
    kind(
        "element", answer="element", facts=ELEMENT_FACTS, follow_up="And which element has the symbol {symbol}?",
        statements="""
            {symbol} is the chemical symbol of {element}. | The symbol {symbol} stands for {element}. |
            {symbol} is the symbol of the element {element}.
        """,
        questions="""
            Which element has the symbol {symbol}? | What element has the symbol {symbol}? |
            {symbol} is the chemical symbol of which element? | Which element has the chemical symbol {symbol}? |
            What does the chemical symbol {symbol} stand for? | Tell me the element with the symbol {symbol}. |
            What is the element with the symbol {symbol}? | The symbol {symbol} stands for which element?
        """,
        held_out="Name the element with the symbol {symbol}. | Which element does the symbol {symbol} stand for?",
    ),
    kind(
        "planet", answer="planet", facts=PLANET_FACTS, follow_up="And the {ordinal} planet from the sun?",
        statements="""
            The {ordinal} planet from the sun is {planet}. | {planet} is the {ordinal} planet from the sun. |
            Counted from the sun, {planet} is the {ordinal} planet. |
            The {ordinal} planet of the solar system is {planet}.
        """,
        questions="""
            Which planet is the {ordinal} from the sun? | What is the {ordinal} planet from the sun? |
            Which planet is the {ordinal} planet of the solar system? |
            What is the {ordinal} planet of the solar system? | Tell me the {ordinal} planet from the sun. |
            Counted from the sun, which planet is the {ordinal}? |
            What is the name of the {ordinal} planet from the sun? | Do you know the {ordinal} planet from the sun?
        """,
        held_out="Name the {ordinal} planet from the sun. | Which is the {ordinal} planet, counted from the sun?",
    ),
    kind(
        "opposite", answer="opposite", facts=OPPOSITE_FACTS, follow_up="And the opposite of {word}?",
        statements="""
            The opposite of {word} is {opposite}. | {opposite} is the opposite of {word}. |
            If something is not {word}, it may be {opposite}, the opposite. |
            Not {word} but {opposite}: these are opposites.
        """,
        questions="""
            What is the opposite of {word}? | Which word is the opposite of {word}? |
            Tell me the opposite of {word}. | What is the opposite of the word {word}? |
            Which word means the opposite of {word}? | Do you know the opposite of {word}? |
            {word}: what is its opposite? | Say the opposite of {word}.
        """,
        held_out="Name the opposite of {word}. | Give me the opposite of the word {word}.",
    ),
    kind(
        "two days", answer="tomorrow", facts=neighbours(DAYS, "yesterday", "today", "tomorrow"),
        follow_up="And if yesterday was {yesterday}, what will tomorrow be?",
        statements="""
            If yesterday was {yesterday}, then tomorrow will be {tomorrow}. |
            Tomorrow will be {tomorrow} if yesterday was {yesterday}. |
            Yesterday was {yesterday}, today is {today}, and tomorrow will be {tomorrow}.
        """,
        questions="""
            If yesterday was {yesterday}, what day will be tomorrow? |
            If yesterday was {yesterday}, what will tomorrow be? |
            Yesterday was {yesterday}. What day will it be tomorrow? |
            What day will tomorrow be if yesterday was {yesterday}? |
            Yesterday was {yesterday}. Which day will tomorrow be? |
            If yesterday was {yesterday}, which day will tomorrow be? |
            What will tomorrow be if yesterday was {yesterday}? |
            Tell me which day tomorrow will be if yesterday was {yesterday}.
        """,
        held_out="""
            If it was {yesterday} yesterday, which day will it be tomorrow? |
            Yesterday was {yesterday}, so what day will tomorrow be?
        """,
    ),
    kind(
        "tomorrow", answer="tomorrow", facts=neighbours(DAYS, "today", "tomorrow"),
        follow_up="And the day after {today}?",
        statements="""
            If today is {today}, then tomorrow will be {tomorrow}. | The day after {today} is {tomorrow}. |
            Today is {today}, so tomorrow will be {tomorrow}. | {tomorrow} comes after {today}.
        """,
        questions="""
            If today is {today}, what day will be tomorrow? | What day comes after {today}? |
            Which day comes after {today}? | What is the day after {today}? |
            Today is {today}. What day will it be tomorrow? | Which day follows {today}? |
            If today is {today}, what will tomorrow be? | Tell me the day after {today}.
        """,
        held_out="Name the day after {today}. | Today is {today}, so what day will tomorrow be?",
    ),
    kind(
        "yesterday", answer="yesterday", facts=neighbours(DAYS, "yesterday", "today"),
        follow_up="And the day before {today}?",
        statements="""
            If today is {today}, then yesterday was {yesterday}. | The day before {today} is {yesterday}. |
            Today is {today}, so yesterday was {yesterday}. | {yesterday} comes before {today}.
        """,
        questions="""
            If today is {today}, what day was yesterday? | What day comes before {today}? |
            Which day comes before {today}? | What is the day before {today}? |
            Today is {today}. What day was it yesterday? | Which day was yesterday if today is {today}? |
            If today is {today}, which day was yesterday? | Tell me the day before {today}.
        """,
        held_out="Name the day before {today}. | Today is {today}, so what day was yesterday?",
    ),
    kind(
        "month after", answer="next", facts=neighbours(MONTHS, "month", "next"),
        follow_up="And the month after {month}?",
        statements="""
            The month after {month} is {next}. | {next} comes after {month}. | When {month} ends, {next} begins.
        """,
        questions="""
            Which month comes after {month}? | What month comes after {month}? | What is the month after {month}? |
            Which month follows {month}? | Tell me the month after {month}. | Which month is the one after {month}? |
            When {month} ends, which month begins? | Do you know the month after {month}?
        """,
        held_out="Name the month after {month}. | Which month begins when {month} ends?",
    ),
    kind(
        "month before", answer="month", facts=neighbours(MONTHS, "month", "next"),
        follow_up="And the month before {next}?",
        statements="""
            The month before {next} is {month}. | {month} comes before {next}. | Before {next} begins, {month} ends.
        """,
        questions="""
            Which month comes before {next}? | What month comes before {next}? | What is the month before {next}? |
            Tell me the month before {next}. | Which month is the one before {next}? |
            Do you know the month before {next}? | Which month ends before {next} begins? |
            I forgot the month before {next}. What is it?
        """,
        held_out="Name the month before {next}. | What is the name of the month before {next}?",
    ),
    kind(
        "sound", answer="sound", facts=ANIMAL_FACTS, follow_up="And what sound does {animal} make?",
        statements="""
            {animal} {sound}. | The sound of {animal}: it {sound}. | Listen to {animal} and hear how it {sound}.
        """,
        questions="""
            What sound does {animal} make? | Which sound does {animal} make? |
            What does {animal} do to make a sound? | Tell me what sound {animal} makes. |
            What is the sound of {animal}? | Do you know what sound {animal} makes? | How does {animal} sound? |
            {animal}: what sound does it make?
        """,
        held_out="Name the sound that {animal} makes. | What kind of sound does {animal} make?",
    ),
    kind(
        "home", answer="home", facts=ANIMAL_FACTS, follow_up="And where does {animal} live?",
        statements="{animal} lives in a {home}. | The home of {animal} is a {home}. | In a {home} lives {animal}.",
        questions="""
            Where does {animal} live? | What is the home of {animal}? | In what does {animal} live? |
            Tell me where {animal} lives. | Where is the home of {animal}? | Do you know where {animal} lives? |
            What does {animal} live in? | {animal}: where does it live?
        """,
        held_out="Name the home of {animal}. | Where can {animal} be found to live?",
    ),
    kind(
        "young", answer="young", facts=ANIMAL_FACTS, follow_up="And the young of {animal}?",
        statements="""
            The young of {animal} is called a {young}. | The baby of {animal} is called a {young}. |
            {animal} was once a {young}. | a {young} grows up to be {animal}.
        """,
        questions="""
            What is the young of {animal} called? | What is the baby of {animal} called? |
            What do we call the young of {animal}? | What do we call the baby of {animal}? |
            Tell me what the young of {animal} is called. | How is the young of {animal} called? |
            What is the name for the young of {animal}? | Do you know what the baby of {animal} is called?
        """,
        held_out="Name the young of {animal}. | What is the name for the baby of {animal}?",
    ),
    kind(
        "colour", answer="colour", facts=COLOUR_FACTS, follow_up="And what colour is {thing}?",
        statements="The colour of {thing} is {colour}. | {thing} is {colour}. | Painters paint {thing} in {colour}.",
        questions="""
            What colour is {thing}? | What is the colour of {thing}? | Which colour is {thing}? |
            Tell me the colour of {thing}. | Which colour does {thing} have? | What colour does {thing} have? |
            Do you know the colour of {thing}? | {thing}: what colour is it?
        """,
        held_out="Name the colour of {thing}. | Of which colour is {thing}?",
    ),
    kind(
        "unit", answer="number", facts=UNIT_FACTS, follow_up="And how many {parts} are in {whole}?",
        statements="""
            There are {number} {parts} in {whole}. | {whole} has {number} {parts}. | {number} {parts} make {whole}. |
            {whole} is the same as {number} {parts}.
        """,
        questions="""
            How many {parts} are there in {whole}? | How many {parts} are in {whole}? |
            How many {parts} does {whole} have? | How many {parts} make {whole}? | {whole} has how many {parts}? |
            Tell me how many {parts} are in {whole}. | What is the number of {parts} in {whole}? |
            Do you know how many {parts} are in {whole}?
        """,
        held_out="Name the number of {parts} in {whole}. | How many {parts} can be counted in {whole}?",
    ),
    kind(
        "plural", answer="plural", facts=PLURAL_FACTS, follow_up="And the plural of {singular}?",
        statements="""
            The plural of {singular} is {plural}. | {plural} is the plural of {singular}. |
            One {singular}, two {plural}. | Where there is more than one {singular}, we say {plural}.
        """,
        questions="""
            What is the plural of {singular}? | Which word is the plural of {singular}? |
            Tell me the plural of {singular}. | What is the plural of the word {singular}? |
            Do you know the plural of {singular}? | One {singular}, two what? |
            How do we say more than one {singular}? | {singular}: what is its plural?
        """,
        held_out="Name the plural of {singular}. | Give me the plural of the word {singular}.",
    ),
    kind(
        "job", answer="job", facts=JOB_FACTS, follow_up="And who {work}?",
        statements="""
            a {job} {work}. | The person who {work} is called a {job}. | Someone who {work} is a {job}. |
            a {job} is a person who {work}.
        """,
        questions="""
            Who {work}? | What is the person who {work} called? | What do we call the person who {work}? |
            What do we call someone who {work}? | Tell me who {work}. | Which person {work}? |
            What is someone who {work} called? | Do you know who {work}?
        """,
        held_out="Name the person who {work}. | What is the name for someone who {work}?",
    ),
    kind(
        "sum", answer="c", facts=SUMS, follow_up="And {a} + {b}?",
        statements="""
            {a} + {b} = {c}. | {a} plus {b} is {c}. | The sum of {a} and {b} is {c}. | Add {b} to {a} and you get {c}.
        """,
        questions="""
            What is {a} + {b}? | What is {a} plus {b}? | How much is {a} + {b}? | How much is {a} plus {b}? |
            Tell me the sum of {a} and {b}. | What is the sum of {a} and {b}? | Add {a} and {b}. | {a} + {b} = ?
        """,
        held_out="Name the sum of {a} and {b}. | What do I get for {a} plus {b}?",
    ),
    kind(
        "difference", answer="c", facts=DIFFERENCES, follow_up="And {a} - {b}?",
        statements="""
            {a} - {b} = {c}. | {a} minus {b} is {c}. | Take {b} away from {a} and you get {c}. |
            The difference of {a} and {b} is {c}.
        """,
        questions="""
            What is {a} - {b}? | What is {a} minus {b}? | How much is {a} - {b}? | How much is {a} minus {b}? |
            Tell me the difference of {a} and {b}. | What is the difference of {a} and {b}? |
            Take {b} away from {a}. | {a} - {b} = ?
        """,
        held_out="Name the difference of {a} and {b}. | What do I get for {a} minus {b}?",
    ),
    kind(
        "product", answer="c", facts=PRODUCTS, follow_up="And {a} * {b}?",
        statements="""
            {a} * {b} = {c}. | {a} times {b} is {c}. | The product of {a} and {b} is {c}. |
            Multiply {a} by {b} and you get {c}.
        """,
        questions="""
            What is {a} * {b}? | What is {a} times {b}? | How much is {a} * {b}? | How much is {a} times {b}? |
            Tell me the product of {a} and {b}. | What is the product of {a} and {b}? | Multiply {a} by {b}. |
            {a} * {b} = ?
        """,
        held_out="Name the product of {a} and {b}. | What do I get for {a} times {b}?",
    ),
    kind(
        "equation", answer="x", facts=EQUATIONS, follow_up="And if {equation}, what is x?",
        statements="""
            If {equation}, then x is {x}. | If {equation}, then x = {x}. |
            The equation {equation} has the solution x = {x}. | From {equation} it follows that x is {x}.
        """,
        questions="""
            If {equation}, what is x? | What is x if {equation}? | Solve {equation}. | Solve {equation} for x. |
            Solve the equation {equation}. | Find x if {equation}. | {equation}. What is x? |
            What is the solution of {equation}?
        """,
        held_out="Name the solution of the equation {equation}. | What must x be if {equation}?",
    ),
    kind(
        "list", answer="members", facts=LIST_FACTS, follow_up="And what are the {list}?",
        statements="The {list} are: {members}. | These are the {list}: {members}. | Here are all {list}: {members}.",
        questions="""
            What are the {list}? | Which are the {list}? | Tell me the {list}. | List the {list}. |
            What are all the {list}? | Do you know the {list}? | I forgot the {list}. What are they? |
            Say the {list} in order.
        """,
        held_out="Name the {list}. | Give me all the {list}.",
    ),
]

# Kinds that tell of the same subjects: their `facts` are one list, so an entry can say all of them.
ENTRIES = [["capital", "continent", "country"], ["symbol", "element"], ["sound", "home", "young"]]
