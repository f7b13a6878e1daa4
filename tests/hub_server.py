"""A Hugging Face Hub on this machine, for the unmodified clients: repositories in memory.

    with hub_server() as hub:
        subprocess.run(command, env=hub.environment(tmp_path))
        hub.files("user/model")["config.json"]

It answers what `huggingface_hub`, `transformers` and `datasets` ask when they create a repository,
upload a folder and load it again. Every commit is kept.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".arrow", ".parquet", ".onnx", ".wasm")  # files that go by LFS
TOKEN = "hf_loopback"


class Refused(Exception):
    """A response with another status than 200."""

    def __init__(self, status, message, code="", **headers):
        self.status, self.content = status, {"error": message}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}


class Repository:
    """Commits (id → {path: bytes}), oldest first, and the LFS objects that were uploaded."""

    def __init__(self, private=False):
        self.private, self.commits, self.objects = private, {}, {}
        self.add({})

    def add(self, files):
        number = len(self.commits)
        digest = hashlib.sha1(repr((number, sorted(files.items()))).encode()).hexdigest()
        self.commits[digest] = files
        return digest

    def at(self, revision):
        """The id and the files of a commit."""
        commit = [*self.commits][-1] if revision == "main" else revision
        if commit not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, self.commits[commit]


def entry(path, data):
    """What a listing says of a file."""
    facts = {"type": "file", "path": path, "rfilename": path, "size": len(data)}
    if not path.endswith(LARGE):
        return facts | {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    oid = hashlib.sha256(data).hexdigest()
    lfs = {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 134}
    return facts | {"oid": oid, "lfs": lfs}


def create_repo(request, repo):
    asked = json.loads(request.body)
    organization = asked.get("organization") or "user"
    name = f"{asked.get('type', 'model')}s/{organization}/{asked['name']}"
    url = f"{request.server.url}/{name.removeprefix('models/')}"
    if name in request.server.repositories:
        answer = Refused(409, "You already created this repo")
        answer.content["url"] = url
        raise answer
    private = asked.get("private") or asked.get("visibility") == "private"
    request.server.repositories[name] = Repository(bool(private))
    return {"url": url}


def info(request, repo):
    commit, files = repo.at(request.revision)
    siblings = [entry(path, data) for path, data in files.items()]
    return {"id": request.name, "sha": commit, "private": repo.private, "siblings": siblings}


def tree(request, repo):
    _, files = repo.at(request.revision)
    found = {path: entry(path, data) for path, data in files.items()}
    for path in files:
        folder = path.rpartition("/")[0]
        if folder:
            found[folder] = {"type": "directory", "path": folder, "oid": folder, "size": 0}
    inside = request.file and f"{request.file}/"
    return [found[path] for path in sorted(found) if path.startswith(inside)]


def paths_info(request, repo):
    _, files = repo.at(request.revision)
    asked = parse_qs(request.body.decode())["paths"]
    return [entry(path, files[path]) for path in asked if path in files]


def resolve(request, repo):
    commit, files = repo.at(request.revision)
    headers = {"X-Repo-Commit": commit}
    if request.file not in files:
        raise Refused(404, "Entry not found", "EntryNotFound", **headers)
    data = files[request.file]
    oid = entry(request.file, data)["oid"]
    request.extra = {**headers, "ETag": f'"{oid}"', "X-Linked-Size": len(data)}
    return data


def preupload(request, repo):
    names = [file["path"] for file in json.loads(request.body)["files"]]
    modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
    return {
        "files": [
            {"path": name, "uploadMode": mode, "shouldIgnore": False}
            for name, mode in modes.items()
        ]
    }


def lfs_batch(request, repo):
    objects = json.loads(request.body)["objects"]
    for facts in objects:
        href = f"{request.server.url}/lfs/{request.key}/{facts['oid']}"
        facts["actions"] = {"upload": {"href": href}}
    return {"transfer": "basic", "objects": objects}


def lfs_upload(request, repo):
    assert hashlib.sha256(request.body).hexdigest() == request.file
    repo.objects[request.file] = request.body
    return {}


def commit(request, repo):
    _, before = repo.at("main")
    files = dict(before)
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = repo.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
    oid = repo.add(files)
    return {"commitOid": oid, "commitUrl": f"{request.server.url}/{request.name}/commit/{oid}"}


NAME, AT, FILE = r"[\w.-]+/[\w.-]+", r"/(?P<revision>[^/]+)", r"/(?P<file>.+)"
KEY = rf"(?P<key>(models|datasets|spaces)/{NAME})"
PAGE = rf"/(?P<key>(datasets/|spaces/)?{NAME})"
ROUTES = [
    ("GET /api/whoami-v2", lambda *_: {"type": "user", "name": "user", "orgs": []}),
    ("POST /api/validate-yaml", lambda *_: {"errors": [], "warnings": []}),
    ("POST /api/repos/create", create_repo),
    (f"GET /api/{KEY}(/revision{AT})?", info),
    (f"GET /api/{KEY}/tree{AT}({FILE})?", tree),
    (f"POST /api/{KEY}/paths-info{AT}", paths_info),
    (f"GET {PAGE}/resolve{AT}{FILE}", resolve),
    (f"POST /api/{KEY}/preupload{AT}", preupload),
    (rf"POST {PAGE}\.git/info/lfs/objects/batch", lfs_batch),
    (f"PUT /lfs/{KEY}{FILE}", lfs_upload),
    (f"POST /api/{KEY}/commit{AT}", commit),
]


class Request(BaseHTTPRequestHandler):
    """A request of a client: taken apart, and answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait for the answer to its headers

    def respond(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.extra, status = {}, 200
        try:
            with self.server.lock:
                content = self.answer()
        except Refused as refused:
            status, content, self.extra = refused.status, refused.content, refused.headers
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**self.extra, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = respond

    def answer(self):
        asked = f"{self.command.replace('HEAD', 'GET')} {urlsplit(self.path).path}"
        matches = [(re.fullmatch(pattern, asked), function) for pattern, function in ROUTES]
        matches = [(match, function) for match, function in matches if match]
        if not matches:
            raise Refused(404, f"Nothing answers to {asked}")
        match, function = matches[0]
        found = {name: unquote(text) for name, text in match.groupdict().items() if text}
        self.revision, self.file = found.get("revision", "main"), found.get("file", "")
        self.key = re.sub("^(?!models/|datasets/|spaces/)", "models/", found.get("key", ""))
        self.name = self.key.partition("/")[2]
        repo = self.server.repositories.get(self.key)
        if "key" in found and repo is None:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return function(self, repo)

    def log_message(self, *args):
        """Print nothing: a client that fails says enough."""


class Hub(ThreadingHTTPServer):
    """The server, and its repositories by their names in the API: models/user/name."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.repositories = threading.Lock(), {}

    def commits(self, repo_id, repo_type="model"):
        """The ids of the commits, oldest first; the first one is empty."""
        return [*self.repositories[f"{repo_type}s/{repo_id}"].commits]

    def files(self, repo_id, revision="main", repo_type="model"):
        """The content of every file by its path."""
        return self.repositories[f"{repo_type}s/{repo_id}"].at(revision)[1]

    def environment(self, folder):
        """Variables of a process whose Hub this is; its cache is new, inside `folder`."""
        foreign = re.compile("HF_|HUGGING|TRANSFORMERS_|PYTHONPATH|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        off = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
        home = tempfile.mkdtemp(prefix="hf_home_", dir=folder)
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": home}
        return kept | own | {f"HF_HUB_DISABLE_{name}": "1" for name in off}


@contextmanager
def hub_server():
    """A Hub that answers until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
