"""Speech that says when its words begin: eSpeak NG, of the package espeakng_loader, by its C interface."""

import ctypes

import numpy as np

SYNCHRONOUS, CHARACTERS, UTF8, WORD = 2, 1, 1, 1  # its constants that are used here


class Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),  # 0 ends a list of events
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # of the word's first character, from 1
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))


def say(text):
    """ASCII text -> its samples (N,) int16, their rate, and the second at which each word begins."""
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    assert rate > 0 and library.espeak_SetVoiceByName(b"en-us") == 0
    samples, starts = [], []

    def spoken(wave, count, events):
        if count:
            samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while events[i].type:
            if events[i].type == WORD:
                starts.append(events[i].milliseconds / 1000)
            i += 1
        return 0  # go on

    callback = Callback(spoken)
    library.espeak_SetSynthCallback(callback)
    data = text.encode("ascii")
    assert library.espeak_Synth(data, len(data) + 1, 0, CHARACTERS, 0, UTF8, None, None) == 0
    library.espeak_Terminate()
    return np.concatenate(samples), rate, starts
