"""The store over S3 and what speaks its protocol: conditional PUTs, retries inside, errors that say what to do."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from botocore import exceptions as boto
from fsspec.asyn import sync
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from pipeline.errors import (
    AlreadyExists,
    NotFound,
    PipelineError,
    PreconditionFailed,
    StorageError,
    UserError,
)
from pipeline.storage import (
    ConditionsUnsupported,
    ObjectInfo,
    StorageOptions,
    check_key,
    join_url,
    public_url,
    source_changed,
)
from pipeline.storage_fsspec import LazyFilesystem

_Answer = TypeVar("_Answer")
_READ_AHEAD_BYTES = 4 * 2**20
_IDENTITY_HINT = "set AWS_PROFILE, --s3-profile or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"

_BAD_CREDENTIALS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired",
    "InvalidSecurity", "InvalidClientTokenId", "AuthFailure", "RequestTimeTooSkewed", "NotSignedUp",
}  # fmt: skip
_WRONG_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_NO_CREDENTIALS = (
    boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.ProfileNotFound,
    boto.TokenRetrievalError, boto.NoAuthTokenError, boto.SSOError,
)  # fmt: skip
_UNREACHABLE = (boto.ConnectionError, boto.HTTPClientError, TimeoutError)
_BROKEN_BODY = (*S3_RETRYABLE_ERRORS, boto.IncompleteReadError, ConnectionError)


class _Conflict(StorageError):
    """S3 answered 409: two conditional writes met, and neither may have won. Try again."""


class _BeyondEnd(StorageError):
    """The range starts past the last byte."""


class S3Store(LazyFilesystem):
    """Objects under ``s3://bucket/prefix``. Pickles without its connection; opens one per process on first use."""

    def __init__(self, url: str, options: StorageOptions, *, single_writer: bool = False) -> None:
        bucket, _, prefix = url.partition("://")[2].partition("/")
        if "@" in bucket:
            raise UserError(
                f"{public_url(url)} was given with credentials in the URL: leave them out, {_IDENTITY_HINT}"
            )
        if not bucket:
            raise UserError(f"{url} names no bucket: write s3://bucket/prefix")
        self.bucket = bucket
        self.prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.url = join_url(f"s3://{bucket}", self.prefix).rstrip("/")
        self.options = options
        self.single_writer = single_writer

    def __repr__(self) -> str:
        return f"S3Store({self.url!r})"

    def _connect(self) -> Any:
        options = self.options
        filesystem = S3FileSystem(
            anon=options.anon,
            endpoint_url=options.endpoint_url,
            client_kwargs={"region_name": options.region} if options.region else {},
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": options.max_attempts},
                "connect_timeout": options.connect_timeout_s,
                "read_timeout": options.read_timeout_s,
            },
            max_concurrency=4,
            use_listings_cache=False,
            # A cached instance would keep credentials that the environment no longer names.
            skip_instance_cache=True,
            **({"profile": options.profile} if options.profile else {}),
        )
        # One layer of retries, botocore's: s3fs repeats all of them five times for an endpoint that is not there.
        filesystem.retries = 1
        return filesystem

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        page: dict[str, Any] = {}
        last = ""
        while not page or page.get("IsTruncated"):
            token = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
            page = self._call("list_objects_v2", prefix, Prefix=self.prefix + prefix, **token)
            for entry in page.get("Contents", ()):
                key = entry["Key"][len(self.prefix) :]
                if entry["Size"] == 0 and (not key or key.endswith("/")):
                    continue
                if key < last:
                    raise UserError(f"{self.url} lists keys out of order (a directory bucket?): not supported")
                last = key
                yield ObjectInfo(key, entry["Size"], _bare(entry["ETag"]))

    def info(self, key: str) -> ObjectInfo:
        head = self._call("head_object", key, Key=self.prefix + key)
        return ObjectInfo(key, head["ContentLength"], _bare(head["ETag"]))

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        request: dict[str, Any] = {"Key": self.prefix + key}
        if start or length is not None:
            # A range of no bytes cannot be asked for: ask for one and drop it, so that errors are the same.
            end = "" if length is None else start + max(length, 1) - 1
            request["Range"] = f"bytes={start}-{end}"
        if etag is not None:
            request["IfMatch"] = f'"{etag}"'
        try:
            stored, data = self._read(key, request)
        except (PreconditionFailed, NotFound) as error:
            if etag is None:
                raise
            raise source_changed(join_url(self.url, key), etag, "another or gone") from error
        except _BeyondEnd:
            return b""
        # Some stores ignore If-Match on reads.
        if etag is not None and stored != etag:
            raise source_changed(join_url(self.url, key), etag, stored)
        return data if length is None else data[:length]

    def open(self, key: str) -> BinaryIO:
        return io.BufferedReader(_ObjectReader(self, self.info(key)), buffer_size=_READ_AHEAD_BYTES)

    def put_new(self, key: str, data: bytes) -> ObjectInfo:
        def put(**condition: str) -> ObjectInfo:
            answer = self._call("put_object", key, Key=self.prefix + key, Body=data, **condition)
            return ObjectInfo(key, len(data), _bare(answer["ETag"]))

        return self._create(key, put)

    def put_new_file(self, key: str, path: Path) -> ObjectInfo:
        if "?versionId=" in self.prefix + key:
            raise StorageError(f"{join_url(self.url, key)}: s3fs would cut the key at ?versionId=, refused")

        def put(**condition: str) -> ObjectInfo:
            # S3 takes 10,000 parts at most.
            part_bytes = max(self.options.part_bytes, -(-path.stat().st_size // 10_000))
            target = f"{self.bucket}/{self.prefix}{key}"
            mode = "create" if condition else "overwrite"
            with self._errors(key, conditional=bool(condition)):
                self._fs.put_file(str(path), target, chunksize=part_bytes, mode=mode)
            return self.info(key)

        return self._create(key, put)

    def replace(self, key: str, data: bytes, *, etag: str) -> ObjectInfo:
        condition = {} if self.single_writer else {"IfMatch": f'"{etag}"'}

        def put() -> Any:
            return self._call("put_object", check_key(key), Key=self.prefix + key, Body=data, **condition)

        try:
            answer = self._settled(put)
        except (PreconditionFailed, NotFound) as error:
            where = join_url(self.url, key)
            raise PreconditionFailed(f"{where}: version {etag} was to be replaced, it is gone or another") from error
        return ObjectInfo(key, len(data), _bare(answer["ETag"]))

    def delete(self, key: str) -> None:
        self._call("delete_object", check_key(key), Key=self.prefix + key)

    def _create(self, key: str, put: Callable[..., ObjectInfo]) -> ObjectInfo:
        where = join_url(self.url, check_key(key))
        if self.single_writer:
            try:
                self.info(key)
            except NotFound:
                return put()
            raise AlreadyExists(f"{where} exists already")
        try:
            return self._settled(lambda: put(IfNoneMatch="*"))
        except PreconditionFailed as error:
            raise AlreadyExists(f"{where} exists already") from error

    def _settled(self, put: Callable[[], _Answer]) -> _Answer:
        """Repeats a conditional write until S3 decides it: a 409 says only that another one was under way."""
        for attempt in range(1, self.options.max_attempts):
            try:
                return put()
            except _Conflict:
                time.sleep(0.1 * 2**attempt)
        return put()

    def _read(self, key: str, request: dict[str, Any]) -> tuple[str, bytes]:
        broken: Exception | None = None
        for attempt in range(1, self.options.max_attempts + 1):
            answer = self._call("get_object", key, **request)
            try:
                return _bare(answer["ETag"]), sync(self._fs.loop, _drain, answer["Body"])
            except _BROKEN_BODY as error:  # botocore retries requests, but not a body that breaks off
                broken = error
            time.sleep(0.1 * 2**attempt)
        where = join_url(self.url, key)
        raise StorageError(f"{where}: the answer broke off {self.options.max_attempts} times") from broken

    def _call(self, method: str, key: str, **request: Any) -> Any:
        conditional = method == "put_object" and not request.keys().isdisjoint(("IfMatch", "IfNoneMatch"))
        with self._errors(key, conditional=conditional):
            return self._fs.call_s3(method, Bucket=self.bucket, **request)

    @contextmanager
    def _errors(self, key: str, *, conditional: bool) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, boto.BotoCoreError) as error:
            raise explain(error, self, key, conditional=conditional) from error


async def _drain(body: Any) -> bytes:
    async with body:
        data: bytes = await body.read()
        return data


class _ObjectReader(io.RawIOBase):
    """Seekable reads of one version of an object; raises SourceChanged when it is replaced meanwhile."""

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        super().__init__()
        self._store = store
        self._info = info
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._info.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._fetch(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        # The inherited one asks for 8 KiB at a time, each of them a request.
        return self._fetch(self._info.size)

    def _fetch(self, wanted: int) -> bytes:
        length = min(wanted, self._info.size - self._position)
        if length <= 0:
            return b""
        data = self._store.get(self._info.key, start=self._position, length=length, etag=self._info.etag)
        self._position += len(data)
        return data


def explain(error: Exception, store: S3Store, key: str, *, conditional: bool = False) -> PipelineError:
    """Turns what s3fs and botocore raise into one line that says what to do; holds no secret.

    Args:
        error: A botocore error, or the OSError that s3fs made of it (then its cause tells more).
        store: Where it happened.
        key: The key that was asked for.
        conditional: The request carried a write condition that the store may not know.
    """
    where, endpoint = join_url(store.url, key), store.options.endpoint_url or "AWS S3 (no --s3-endpoint given)"
    answer = error if isinstance(error, boto.ClientError) else error.__cause__
    if isinstance(answer, boto.ClientError):
        code = str(answer.response.get("Error", {}).get("Code", ""))
        status = int(answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        decided = _decided(code, status, where)
        return decided or _refused(code, status, (store, where, endpoint), conditional=conditional)
    if isinstance(error, boto.ProfileNotFound):
        return UserError(
            f"the AWS profile for {store.url} is not in the AWS configuration: check AWS_PROFILE, --s3-profile"
        )
    if isinstance(error, _NO_CREDENTIALS):
        return UserError(f"no usable S3 credentials for {store.url} at {endpoint}: {_IDENTITY_HINT}")
    if isinstance(error, _UNREACHABLE):
        return StorageError(
            f"cannot reach {endpoint} for {where} ({type(error).__name__}): check --s3-endpoint, network"
        )
    if isinstance(error, (ValueError, boto.ParamValidationError)):
        return UserError(f"{store.url} at {endpoint} is not a valid address: check the bucket name and --s3-endpoint")
    return StorageError(f"{where} at {endpoint}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _decided(code: str, status: int, where: str) -> PipelineError | None:
    """The answers that are part of the protocol, as errors for the caller to act on."""
    if code in ("NoSuchKey", "404", "NoSuchVersion"):
        return NotFound(f"{where} does not exist")
    if status == 412:
        return PreconditionFailed(f"{where} is another version than the condition names")
    if code == "ConditionalRequestConflict" or (status == 409 and code in ("OperationAborted", "409")):
        return _Conflict(f"{where}: conditional writes keep colliding")
    if status == 416:
        return _BeyondEnd(f"{where} ends before the range")
    return None


def _refused(code: str, status: int, place: tuple[S3Store, str, str], *, conditional: bool) -> PipelineError:
    """The answers that somebody has to do something about."""
    store, where, endpoint = place
    if code == "NoSuchBucket":
        hint = "create it, or check the URL and --s3-endpoint"
        return UserError(f"bucket {store.bucket!r} does not exist at {endpoint}: {hint}")
    if code in _BAD_CREDENTIALS:
        return UserError(f"the credentials for {store.url} were refused by {endpoint} ({code}): {_IDENTITY_HINT}")
    if status == 403:
        needs = "s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject"
        return UserError(
            f"no permission for {where} at {endpoint} ({code}): grant {needs} on bucket {store.bucket!r}, "
            "or choose another identity with AWS_PROFILE or --s3-profile"
        )
    if code in _WRONG_REGION:
        return UserError(f"bucket {store.bucket!r} lies in another region ({code}): check --s3-region, --s3-endpoint")
    if conditional and (status in (400, 405, 501) or code == "NotImplemented"):
        return ConditionsUnsupported(f"{endpoint} refuses conditional writes to {store.url} ({status} {code})")
    return StorageError(f"{endpoint} refused {where} ({status} {code}) after {store.options.max_attempts} tries")


def _bare(etag: str) -> str:
    return etag.strip('"')
