"""For people: pictures, a folder of photographs, answers to sentences, and what is wrong with a set on disk."""
