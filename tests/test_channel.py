import concurrent.futures
import random
import threading
import time

import jax
import numpy as np
import pytest

from fdg_jax.channel import ChannelClosed, Kind, LocalChannel, Message

SOON = 5.0
"""Seconds within which what must happen has happened, on a loaded machine too."""


def _message(batch, payload=None):
    return Message(Kind.TRAIN, batch, payload)


@pytest.fixture
def open_channel():
    """Creates channels, and closes them at the end so that no thread is left."""
    channels = []

    def create(*args, **kwargs):
        channels.append(LocalChannel(*args, **kwargs))
        return channels[-1]

    yield create
    for channel in channels:
        channel.close()


def _start(function, *args):
    """Calls a function in a thread of its own and returns the future result."""
    future = concurrent.futures.Future()

    def call():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _is_waiting(future):
    """Whether a call has not come back after a while."""
    return not concurrent.futures.wait([future], timeout=0.05).done


def test_messages_arrive_in_the_order_sent(open_channel):
    channel = open_channel(5)
    sent = [_message(n) for n in range(5)]
    for message in sent:
        channel.put(message)
    assert [channel.get() for _ in sent] == sent


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("capacity", [1, 2, 5])
def test_a_hurried_and_a_slow_thread_lose_nothing_and_keep_the_bound(
    open_channel, capacity, seed
):
    channel, num_messages = open_channel(capacity), 60

    def naps(salt):
        rng = random.Random(10 * seed + salt)
        for n in range(num_messages):
            # Long runs without a nap fill the channel, or empty it.
            time.sleep(rng.choice([0, 0, 0, 0.002]))
            yield n

    producer = _start(lambda: [channel.put(_message(n)) for n in naps(0)])
    received = [channel.get().batch for _ in naps(1)]
    producer.result(SOON)
    assert received == list(range(num_messages))
    assert 1 <= channel.most_held <= capacity
    assert channel.empty()


def test_put_waits_while_the_channel_is_full(open_channel):
    channel = open_channel(2)
    channel.put(_message(0))
    assert not channel.full()
    channel.put(_message(1))
    assert channel.full()
    put = _start(channel.put, _message(2))
    assert _is_waiting(put)
    assert channel.get().batch == 0
    put.result(SOON)
    assert channel.most_held == 2


def test_get_waits_while_the_channel_is_empty(open_channel):
    channel = open_channel(1)
    assert channel.empty()
    get = _start(channel.get)
    assert _is_waiting(get)
    channel.put(_message(7))
    assert get.result(SOON).batch == 7


def test_close_wakes_a_waiting_writer_within_a_second(open_channel):
    channel = open_channel(1)
    channel.put(_message(0))
    put = _start(channel.put, _message(1))
    assert _is_waiting(put)
    channel.close()
    with pytest.raises(ChannelClosed):
        put.result(1.0)


def test_close_wakes_a_waiting_reader_within_a_second(open_channel):
    channel = open_channel(1)
    get = _start(channel.get)
    assert _is_waiting(get)
    channel.close()
    with pytest.raises(ChannelClosed):
        get.result(1.0)


def test_a_closed_channel_refuses_both_sides_and_drops_what_it_held(open_channel):
    channel = open_channel(3)
    channel.put(_message(0))
    channel.close()
    channel.close()
    assert channel.empty()
    with pytest.raises(ChannelClosed):
        channel.get()
    with pytest.raises(ChannelClosed):
        channel.put(_message(1))


def test_a_payload_moves_to_the_readers_device(open_channel):
    here, there = jax.devices()[:2]
    payload = {"x": jax.device_put(np.arange(3.0), here), "nothing": None}
    channel = open_channel(1, placement=there)
    channel.put(Message(Kind.EVALUATE, 4, payload))
    message = channel.get()
    assert (message.kind, message.batch) == (Kind.EVALUATE, 4)
    assert message.payload["x"].devices() == {there}
    assert message.payload["nothing"] is None
    np.testing.assert_array_equal(message.payload["x"], payload["x"])


def test_a_payload_is_left_alone_without_a_device(open_channel):
    payload = {"x": jax.device_put(np.arange(3.0), jax.devices()[1])}
    channel = open_channel(1)
    message = _message(0, payload)
    channel.put(message)
    assert channel.get() is message
