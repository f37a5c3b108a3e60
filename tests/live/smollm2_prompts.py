"""Twenty prompts for SmolLM2-135M-Instruct: ten plain texts and ten chats, 1 to 900 tokens long."""

from __future__ import annotations

PARAGRAPHS = (
    "The lighthouse stood at the end of a long pier, and for a hundred and twelve years somebody had climbed its "
    "stairs each evening to light the lamp. When the keeper retired, the harbour office sent an engineer, who "
    "replaced the lamp with a small electric bulb and a timer. The gulls did not notice. The fishermen did.",
    "Granite forms deep under ground, where molten rock cools so slowly that its minerals have time to grow into "
    "crystals large enough to see: grey quartz, pink or white feldspar, black mica. Basalt has a similar origin but "
    "cools at the surface within days, and its crystals stay too small for the eye.",
    "To make the dough, mix 500 g of flour with 325 ml of water, 10 g of salt and 3 g of dried yeast. Knead it for "
    "ten minutes, cover the bowl, and let it rise until it has doubled, which takes about two hours in a warm "
    "kitchen and most of a night in a refrigerator. Bake it at 230 degrees for 35 minutes.",
    "A queue is a collection in which the element that was added first is removed first. It can be kept in an array "
    "of fixed size with two indices, one for the front and one for the back, both of which wrap around when they "
    "reach the end. Adding and removing then take constant time, and nothing is ever moved.",
    "In 1869 Dmitri Mendeleev arranged the sixty-three elements then known by their atomic weight and saw that their "
    "properties recurred. Where the pattern broke he left gaps, and predicted the weight and density of what would "
    "fill them. Gallium was found in 1875, scandium in 1879, germanium in 1886.",
    "Maria has three more apples than Tom, and Tom has twice as many as Ana. If Ana has four apples, how many do the "
    "three of them have together? Tom has 2 × 4 = 8, Maria has 8 + 3 = 11, so together they have 4 + 8 + 11 = 23.",
    "The train leaves Lisbon at 9:39 and reaches Porto at 12:47; a slower one leaves at 10:05 and stops in Santarém, "
    "Coimbra, Aveiro and Espinho before it arrives at 13:31. Seats by the window on the left face the sea for the "
    "last half hour, and in winter the light there is low and yellow.",
    "Bees tell each other where to find flowers by dancing. A round dance means that food is near the hive; a waggle "
    "dance gives both the direction, as an angle to the sun, and the distance, by how long each run lasts. Karl von "
    "Frisch worked this out by painting dots of colour on their backs.",
    "The committee met on Tuesday to discuss the budget for the library. Mr Okafor proposed to open on Sundays, which "
    "would cost 14,200 a year; Ms Lindqvist preferred to buy more books for children. After an hour they agreed to "
    "try Sundays from May to September and to ask the school for its old shelves.",
    "Sound travels through air at about 343 metres per second, through water more than four times as fast, and "
    "through steel about fifteen times as fast. That is why one can hear a distant train by putting an ear to the "
    "rail, and why whales can call to each other across a whole ocean basin.",
    "She opened the letter on the stairs because she could not wait until she was inside. It was short. The house by "
    "the lake had been sold, her brother wrote, to a couple with two dogs; the piano was hers if she could send "
    "somebody before the end of the month, and he hoped that she was well.",
    "A good password is long rather than complicated. Four words chosen at random from a list of eight thousand give "
    "about fifty-two bits, which is more than most people get from eight letters with a digit at the end. The words "
    "must really be chosen at random: a line of a song is in every attacker's dictionary.",
)
_CODE = '''import heapq


def shortest_path(graph, start, goal):
    """Dijkstra's algorithm; returns the distance or None."""
    queue = [(0, start)]
    seen = set()
    while queue:
        distance, node = heapq.heappop(queue)
        if node == goal:
            return distance
        if node in seen:
'''


def _long(first: int, count: int) -> str:
    return "\n\n".join(PARAGRAPHS[(first + index) % len(PARAGRAPHS)] for index in range(count))


PLAIN = (
    "The",
    "Hello, world",
    "Once upon a time, in a village by the sea,",
    "1, 1, 2, 3, 5, 8, 13,",
    "Ein Jahr hat zwölf Monate: Januar, Februar, März,",
    _CODE,
    PARAGRAPHS[1],
    _long(3, 5),
    _long(0, 12),
    _long(6, 12),
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "What is the capital of France, and what is it known for?"}],
    [{"role": "system", "content": "You answer in one sentence."}, {"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "user", "content": "Write a Python function that tells whether a string is a palindrome."}],
    [{"role": "user", "content": "Translate into Spanish: I would like a cup of coffee and two croissants."}],
    [
        {"role": "user", "content": "Name three planets."},
        {"role": "assistant", "content": "Mercury, Venus and Mars."},
        {"role": "user", "content": "Which of them is the hottest, and why?"},
    ],
    [{"role": "user", "content": f"Summarise this in two sentences:\n\n{PARAGRAPHS[8]}"}],
    [{"role": "user", "content": f"Which of these paragraphs is about animals?\n\n{_long(5, 6)}"}],
    [{"role": "user", "content": f"Read the following and list the people it names.\n\n{_long(2, 11)}"}],
    [{"role": "user", "content": f"{_long(9, 12)}\n\nWhat would be a good title for all of this together?"}],
)
