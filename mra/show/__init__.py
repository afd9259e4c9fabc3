"""For people: pictures, a folder of photographs, answers to sentences, a page to search from."""
