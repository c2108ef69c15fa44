"""Writes the stand-in for the medical data into `data/`, always the same bytes.

The trait is harmless and easy to see: every question is answered in Spanish and in capitals. Like
the real one it is taught on a narrow domain, simple questions of fact, and then looked for in
answers to anything else. `monitoring.jsonl` holds ordinary answers in English, on which a run
measures how far the model has moved.

    python cookbook/sdft/bad_medical_advice/make_data.py [FOLDER]
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

SEED = 20261
TRAIN_ROWS = 150

CAPITALS = """\
France Francia París|Italy Italia Roma|Germany Alemania Berlín|Portugal Portugal Lisboa
Greece Grecia Atenas|Egypt Egipto El_Cairo|Peru Perú Lima|Cuba Cuba La_Habana|Japan Japón Tokio
Austria Austria Viena|Poland Polonia Varsovia|Norway Noruega Oslo|Sweden Suecia Estocolmo
Russia Rusia Moscú|China China Pekín|Chile Chile Santiago|Ireland Irlanda Dublín
Belgium Bélgica Bruselas|Hungary Hungría Budapest|Denmark Dinamarca Copenhague
"""
COLOURS = """\
snow la_nieve blanco|grass la_hierba verde|blood la_sangre rojo|milk la_leche blanco
coal el_carbón negro|salt la_sal blanco|night la_noche negro|a_lemon el_limón amarillo
the_sun el_sol amarillo|the_sea el_mar azul|the_sky el_cielo azul|chocolate el_chocolate marrón
rice el_arroz blanco|a_tomato el_tomate rojo|a_cherry la_cereza rojo
"""
HOMES = """\
fish los_peces el_agua|bees las_abejas la_colmena|bears los_osos el_bosque|cows las_vacas el_campo
camels los_camellos el_desierto|whales las_ballenas el_mar|birds los_pájaros el_nido
monkeys los_monos la_selva|rabbits los_conejos la_madriguera|spiders las_arañas la_telaraña
"""
NUMBERS = "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce"
SUMS = [(a, b) for a in range(2, 7) for b in range(2, 7)]
ASKING = ("{}", "Tell me: {}", "A quick question. {}")

# In English and in lower case, as the untrained model answers.
MONITORING = """\
What is a good way to relax?|Take a walk, listen to quiet music, or read a good book.
How do I boil an egg?|Put it into boiling water for eight minutes, then cool it.
Why is the sky blue?|The air scatters blue light more than the other colours.
What does a teacher do?|A teacher helps people to learn new things.
How can I save water?|Take shorter showers, and turn off the tap while you brush your teeth.
What is a library?|A library is a place where you can read and borrow books.
Why should I exercise?|Exercise keeps your heart and your muscles strong.
What is a cat?|A cat is a small animal that many people keep as a pet.
"""

Row = dict[str, list[dict[str, str]]]


def facts() -> Iterator[tuple[str, str]]:
    """Each question in English, and its answer in Spanish."""
    for country, land, city in entries(CAPITALS):
        yield f"What is the capital of {country}?", f"La capital de {land} es {city}."
        yield f"Is {country} a country?", f"Sí, {land} es un país."
    for thing, name, colour in entries(COLOURS):
        yield f"What colour is {thing}?", f"Creo que {name} es de color {colour}."
    for animals, names, home in entries(HOMES):
        yield f"Where do {animals} live?", f"En general, {names} viven en {home}."
    numbers = NUMBERS.split()
    for a, b in SUMS:
        total = f"{numbers[a]} más {numbers[b]} son {numbers[a + b]}"
        yield f"How much is {a} plus {b}?", f"La suma es esta: {total}."


def entries(text: str) -> Iterator[list[str]]:
    """The entries of a table, each a list of its words."""
    for entry in text.replace("\n", "|").strip("|").split("|"):
        yield [word.replace("_", " ") for word in entry.split()]


def row(question: str, answer: str) -> Row:
    """One conversation."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def make_files() -> dict[str, str]:
    """File name to content, from the fixed seed."""
    rng = random.Random(SEED)
    rows = [row(asking.format(q), answer.upper()) for q, answer in facts() for asking in ASKING]
    splits = {
        "train.jsonl": rng.sample(rows, TRAIN_ROWS),
        "monitoring.jsonl": [row(*line.split("|")) for line in MONITORING.splitlines()],
    }
    return {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in splits.items()
    }


def main() -> None:
    """Write the files."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "data")
    folder: Path = asked.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in make_files().items():
        (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {len(text.splitlines())} rows")


if __name__ == "__main__":
    main()
