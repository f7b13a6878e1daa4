"""A Hugging Face Hub in one file, on the loopback interface, for the unmodified clients.

Repositories of models and datasets, in memory: commits, and the LFS objects that they name. It
speaks what `huggingface_hub` speaks with Xet switched off. A branch moves only when a commit was
received whole and every LFS object it names is there, with its size and its sha256.

Longer than a file should be: what the clients expect of one Hub stands in one place.

    with hub_server() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path))
        hub.files("user/model")["config.json"]
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
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_NAMES, LFS_BYTES = (".safetensors", ".arrow", ".parquet"), 10_000_000


class Answer(Exception):
    """A response; content that is not bytes goes out as JSON. What is refused is raised."""

    def __init__(self, status, content, **headers):
        self.status, self.content, self.headers = status, content, headers


def refusal(status, message, code=None, **headers):
    """An error in the form from which the clients make their own."""
    code = {} if code is None else {"X-Error-Code": code}
    return Answer(status, {"error": message}, **{"X-Error-Message": message}, **code, **headers)


class Blob(NamedTuple):
    """The content of a file."""

    data: bytes
    lfs: bool

    def facts(self, path):
        """What a listing says of it. The oid is an LFS object's sha256, otherwise git's sha1."""
        size, oid = len(self.data), hashlib.sha256(self.data).hexdigest()
        if not self.lfs:
            oid = hashlib.sha1(b"blob %d\0" % size + self.data).hexdigest()
        facts = {"type": "file", "path": path, "rfilename": path, "oid": oid, "size": size}
        lfs = {"oid": oid, "sha256": oid, "size": size, "pointerSize": 134}
        return facts | {"lfs": lfs} if self.lfs else facts


class Commit(NamedTuple):
    """All files of a repository at one moment."""

    id: str
    files: dict[str, Blob]

    def entries(self):
        """A listing of the files and folders, by their paths."""
        found = {path: blob.facts(path) for path, blob in self.files.items()}
        for folder in {str(f) for path in self.files for f in PurePosixPath(path).parents}:
            oid = hashlib.sha1(f"{self.id} {folder}".encode()).hexdigest()
            found[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
        return {path: found[path] for path in sorted(found) if path not in (".", "/")}


class Repository:
    """Commits, the branches that point at them, and the LFS objects that a commit may name."""

    def __init__(self, name, private=False):
        self.name, self.private = name, private  # the name as in the API: models/user/name
        self.commits, self.branches, self.objects = {}, {}, {}
        self.add("main", "initial commit", {})

    def add(self, branch, title, files):
        """Move a branch to a new commit of these files."""
        facts = [self.name, self.branches.get(branch), title]
        facts += sorted((path, blob.facts(path)["oid"]) for path, blob in files.items())
        commit = Commit(hashlib.sha1(json.dumps(facts).encode()).hexdigest(), files)
        self.commits[commit.id], self.branches[branch] = commit, commit.id
        return commit

    def at(self, revision):
        """The commit that a branch or a whole commit id stands for."""
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def check_path(path):
    """Refuse what is not a plain relative path under the rules of every operating system."""
    if {"", ".", ".."} & set(path.replace("\\", "/").split("/")) or ":" in path:
        raise refusal(400, f"Invalid path: {path!r}")


def create_repo(request, repo):
    asked, repositories = json.loads(request.body), request.server.repositories
    name = f"{asked.get('type', 'model')}s/{asked['organization'] or 'user'}/{asked['name']}"
    url = f"{request.server.url}/{name.removeprefix('models/')}"
    if name in repositories:  # the clients read the url of a 409, too
        raise Answer(409, {"error": "You already created this repo", "url": url})
    repositories[name] = Repository(name, asked.get("visibility") == "private")
    return {"url": url}


def info(request, repo):
    commit, repo_id = repo.at(request.revision), repo.name.partition("/")[2]
    files = [blob.facts(path) for path, blob in commit.files.items()]
    return {"id": repo_id, "sha": commit.id, "private": repo.private, "siblings": files}


def refs(request, repo):
    branches = repo.branches.items()
    facts = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": oid} for b, oid in branches]
    return {"branches": facts, "tags": [], "converts": []}


def tree(request, repo):
    found, prefix = repo.at(request.revision).entries(), f"{request.file}/".lstrip("/")
    inside = [path for path in found if path.startswith(prefix)]
    if prefix and not inside:
        raise refusal(404, f"{request.file} does not exist", "EntryNotFound")
    if request.query.get("recursive") != ["true"]:
        inside = [path for path in inside if "/" not in path.removeprefix(prefix)]
    return [found[path] for path in inside]


def paths_info(request, repo):
    found = repo.at(request.revision).entries()
    return [found[path] for path in parse_qs(request.body.decode())["paths"] if path in found]


def resolve(request, repo):
    """A file, or the part of it that the header Range names."""
    commit = repo.at(request.revision)
    headers = {"X-Repo-Commit": commit.id}  # of a missing file, too: the clients remember that
    if request.file not in commit.files:
        check_path(request.file)
        raise refusal(404, "Entry not found", "EntryNotFound", **headers)
    blob = commit.files[request.file]
    size, headers["ETag"] = len(blob.data), f'"{blob.facts(request.file)["oid"]}"'
    if blob.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(size)}
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if part is None:
        return Answer(200, blob.data, **headers)
    start, stop = int(part[1]), min(size, int(part[2] or size) + 1)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(206, blob.data[start:stop], **headers)


def preupload(request, repo):
    """How each file of a commit is to be sent, and what is there under its name."""
    stored, files = repo.at(request.revision).entries(), []
    for path, size in ((file["path"], file["size"]) for file in json.loads(request.body)["files"]):
        check_path(path)
        mode = "lfs" if path.endswith(LFS_NAMES) or size > LFS_BYTES else "regular"
        oid = stored.get(path, {}).get("oid")
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": files}


def lfs_batch(request, repo):
    """Where the objects are to be sent; those that are there already are not asked for."""
    objects = [{k: o[k] for k in ("oid", "size")} for o in json.loads(request.body)["objects"]]
    for facts in objects:
        if facts["oid"] not in repo.objects:
            href = f"{request.server.url}/api/{repo.name}/lfs/{facts['oid']}/{facts['size']}"
            facts["actions"] = {"upload": {"href": f"{href}?key={request.server.upload_key}"}}
    return {"transfer": "basic", "objects": objects}


def lfs_upload(request, repo):
    oid, size = request.file.split("/")
    if len(request.body) != int(size) or hashlib.sha256(request.body).hexdigest() != oid:
        raise refusal(400, f"This is not the object {oid} of {size} bytes")
    repo.objects[oid] = request.body
    return {}


def commit(request, repo):
    """All operations, or none: what is refused leaves the branch where it was."""
    head = repo.at(request.revision)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    parent = header["value"].get("parentCommit", head.id)
    if request.revision not in repo.branches or parent != head.id:
        raise refusal(412, "A commit goes on the end of a branch")
    files = dict(head.files)
    for operation in operations:
        change(repo, files, operation["key"], **operation["value"])
    url = f"{request.server.url}/{repo.name.removeprefix('models/')}"
    made = repo.add(request.revision, header["value"]["summary"], files)
    return {"commitOid": made.id, "commitUrl": f"{url}/commit/{made.id}"}


def change(repo, files, key, path, content=None, oid=None, size=None, **rest):
    """One operation of a commit."""
    check_path(path.removesuffix("/"))
    inside = [name for name in files if f"{name}/".startswith(path.removesuffix("/") + "/")]
    if key == "file":
        files[path] = Blob(base64.b64decode(content), lfs=False)
    elif key == "lfsFile":
        if size not in (None, len(repo.objects.get(oid, ""))) or oid not in repo.objects:
            raise refusal(400, f"The LFS object of {path} has not been uploaded")
        files[path] = Blob(repo.objects[oid], lfs=True)
    elif key not in ("deletedFile", "deletedFolder"):
        raise refusal(400, f"Unknown operation: {key}")
    elif not inside:
        raise refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    else:
        for name in inside:
            del files[name]


NAME, AT, FILE = r"[\w.-]+/[\w.-]+", r"/(?P<revision>[^/]+)", r"/(?P<file>.+)"
API, PAGE = rf"/api/(?P<name>(models|datasets)/{NAME})", rf"/(?P<name>(datasets/)?{NAME})"
ROUTES = [  # what is asked, whether it takes the token, what answers
    ("GET /api/whoami-v2", True, lambda *_: {"type": "user", "name": "user", "orgs": []}),
    ("POST /api/validate-yaml", False, lambda *_: {"errors": [], "warnings": []}),
    ("POST /api/repos/create", True, create_repo),
    (f"GET {API}(/revision{AT})?", False, info),
    (f"GET {API}/refs", False, refs),
    (f"GET {API}/tree{AT}({FILE})?", False, tree),
    (f"POST {API}/paths-info{AT}", False, paths_info),
    (f"GET {PAGE}/resolve{AT}{FILE}", False, resolve),
    (f"POST {API}/preupload{AT}", True, preupload),
    (rf"POST {PAGE}\.git/info/lfs/objects/batch", True, lfs_batch),
    (f"PUT {API}/lfs{FILE}", True, lfs_upload),
    (f"POST {API}/commit{AT}", True, commit),
]


class Request(BaseHTTPRequestHandler):
    """A request of a client: read whole, taken apart, answered."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body would wait for the answer to its headers

    def respond(self):
        size = int(self.headers.get("Content-Length", 0))
        cut = self.command == "PUT" and self.server.cut_uploads > 0
        self.body = self.rfile.read(size // 2 if cut else size)
        if len(self.body) < size:  # no answer, as when a connection is lost
            self.server.cut_uploads -= cut
            self.close_connection = True
            return
        try:
            with self.server.lock:
                answer = self.answer()
        except Answer as refused:
            answer = refused
        except (ValueError, KeyError, TypeError) as error:
            answer = refusal(400, f"Malformed request: {error!r}")
        content = answer.content
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = respond  # the names that http.server looks for

    def answer(self):
        url = urlsplit(self.path)
        asked, self.query = f"{self.command} {url.path}", parse_qs(url.query)
        for pattern, takes_token, function in ROUTES:
            if match := re.fullmatch(pattern, asked.replace("HEAD", "GET", 1)):
                found = {name: unquote(text) for name, text in match.groupdict().items() if text}
                self.revision, self.file = found.get("revision", "main"), found.get("file", "")
                content = function(self, self.repository(found.get("name"), takes_token))
                return content if isinstance(content, Answer) else Answer(200, content)
        raise refusal(404, f"Nothing answers to {asked}")

    def repository(self, name, takes_token):
        """The repository that a path names, if whoever asks may know of it."""
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {self.server.token}"):
            raise refusal(401, "Invalid credentials in Authorization header")
        # to an object's address the clients send no token: it holds a key
        known = token or self.query.get("key") == [self.server.upload_key]
        repo = self.server.repositories.get(re.sub("^(?!models/|datasets/)", "models/", name or ""))
        if name and (repo is None or (repo.private and not known)):
            raise refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        if takes_token and not known:
            raise refusal(401, "Invalid username or password.")
        return repo

    def log_message(self, *args):
        """Say nothing: a failing client says enough."""


class Hub(ThreadingHTTPServer):
    """The server, and what a test sees of it. The next `cut_uploads` LFS uploads will be cut."""

    daemon_threads = True
    token, upload_key, cut_uploads = "hf_loopback", "loopback", 0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock, self.repositories = threading.Lock(), {}

    def commits(self, repo_id, repo_type="model"):
        """The ids of the commits, oldest first; the first is empty."""
        return [*self.repositories[f"{repo_type}s/{repo_id}"].commits]

    def files(self, repo_id, revision="main", repo_type="model"):
        """The content of every file by its path."""
        commit = self.repositories[f"{repo_type}s/{repo_id}"].at(revision)
        return {path: blob.data for path, blob in commit.files.items()}

    def environment(self, folder):
        """Variables of a process whose Hub this is; its cache is new, inside `folder`."""
        foreign = re.compile("HF_|HUGGING|TRANSFORMERS_|PYTHONPATH|.*_PROXY", re.IGNORECASE)
        kept = {name: v for name, v in os.environ.items() if not foreign.match(name)}
        off = ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK")
        home = tempfile.mkdtemp(prefix="hf_home_", dir=folder)
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": home}
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
