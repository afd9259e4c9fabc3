"""For people: pictures, a folder of photographs, answers to sentences."""
