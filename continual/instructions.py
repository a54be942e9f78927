"""General instructions whose mean encoding is the fixed reference of the instruction prior.

Every encoding of an English instruction points much the same way; what tells tasks apart is what is left once the
common part is taken off. That part has to be known before the first stage and must not move with later ones, so it
comes from these sentences and never from the tasks of a run.
"""

GENERAL_INSTRUCTIONS = (
    "Answer the question.",
    "Read the text and answer.",
    "Choose the right label for the text.",
    "Translate the sentence.",
    "Write a short summary of the passage.",
    "Solve the problem and give the result.",
    "Explain the steps.",
    "Say whether the statement is true.",
    "Complete the sentence.",
    "Sort the items in the list.",
    "Name the person in the story.",
    "Count how many there are.",
    "Write a reply to the message.",
    "Find the mistake and correct it.",
    "Compare the two and say which one fits better.",
    "Give the value of the function at the point.",
)
