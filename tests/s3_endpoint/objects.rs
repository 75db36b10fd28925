//! Objects as files, with S3's promises: an object is whole or not there, also when this process is
//! killed; a create-if-absent has one winner; what was written is listed and read at once; an upload in
//! parts can be completed until it was.
//!
//! s3s-fs, which keeps objects as files too, is not used: it looks whether an object is there before it
//! renames over it, so that two creators may both win; it forgets an upload before its object is there;
//! it gives a folder as an object, and a missing bucket as a missing object.

use std::collections::BTreeSet;
use std::fs::{self, DirEntry, File, Metadata};
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CommonPrefix,
    CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CreateMultipartUploadInput,
    CreateMultipartUploadOutput, DeleteObjectInput, DeleteObjectOutput, DeleteObjectsInput,
    DeleteObjectsOutput, DeletedObject, ETag, ETagCondition, GetObjectInput, GetObjectOutput,
    HeadBucketInput, HeadBucketOutput, HeadObjectInput, HeadObjectOutput,
    ListMultipartUploadsInput, ListMultipartUploadsOutput, ListObjectsV2Input, ListObjectsV2Output,
    MultipartUpload, Object, PutObjectInput, PutObjectOutput, StreamingBlob, Timestamp,
    UploadPartInput, UploadPartOutput,
};
use s3s::{S3, S3Error, S3Request, S3Response, S3Result, s3_error};

/// Where what is not an object yet is kept. No bucket may have such a name.
const STAGING: &str = ".staging";
const UPLOADS: &str = ".uploads";
/// The file of an upload that names its object.
const TARGET: &str = "target";

/// S3: every part but the last has this much at least.
const MIN_PART_BYTES: u64 = 5 << 20;
/// How much of a body is read at once.
const CHUNK_BYTES: usize = 256 << 10;

#[derive(Debug)]
pub(crate) struct Objects {
    root: PathBuf,
    page: usize,
    ignore_conditions: bool,
    /// Names of staged files: unique in this process, which clears the folder at its start.
    staged: AtomicU64,
}

impl Objects {
    pub(crate) fn open(root: &Path, page: usize, ignore_conditions: bool) -> io::Result<Self> {
        let staging = root.join(STAGING);
        if staging.exists() {
            fs::remove_dir_all(&staging)?;
        }
        fs::create_dir_all(staging)?;
        fs::create_dir_all(root.join(UPLOADS))?;
        Ok(Self {
            root: root.to_owned(),
            page,
            ignore_conditions,
            staged: AtomicU64::new(0),
        })
    }

    fn bucket(&self, name: &str) -> S3Result<PathBuf> {
        let path = self.root.join(name);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() && !name.starts_with('.') => Ok(path),
            Ok(_) => Err(s3_error!(NoSuchBucket, "no bucket {name}")),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(s3_error!(NoSuchBucket, "no bucket {name}"))
            }
            Err(error) => Err(internal(error)),
        }
    }

    /// The file of an object, there or not.
    fn file_of(&self, bucket: &str, key: &str) -> S3Result<PathBuf> {
        let folder = self.bucket(bucket)?;
        // S3 takes such keys; files cannot have them, and nothing of ours does
        let plain = |part: &str| !matches!(part, "" | "." | "..") && part.len() < 256;
        if !key.split('/').all(plain) {
            return Err(s3_error!(
                InvalidArgument,
                "this endpoint keeps no key like {key}"
            ));
        }
        Ok(folder.join(key))
    }

    fn open_object(&self, bucket: &str, key: &str) -> S3Result<(File, Metadata)> {
        let path = self.file_of(bucket, key)?;
        let missing = || s3_error!(NoSuchKey, "no object {key}");
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if is_missing(&error) => return Err(missing()),
            Err(error) => return Err(internal(error)),
        };
        let metadata = file.metadata().map_err(internal)?;
        if metadata.is_file() {
            Ok((file, metadata))
        } else {
            Err(missing())
        }
    }

    /// A file of which nobody else knows.
    fn stage(&self) -> io::Result<(File, PathBuf)> {
        let number = self.staged.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join(STAGING).join(number.to_string());
        Ok((File::create_new(&path)?, path))
    }

    async fn stage_body(
        &self,
        body: Option<StreamingBlob>,
        length: Option<i64>,
    ) -> S3Result<PathBuf> {
        let mut body = body.ok_or_else(|| s3_error!(IncompleteBody))?;
        let (mut file, path) = self.stage().map_err(internal)?;
        let mut written = 0;
        while let Some(chunk) = body.next().await {
            // a body that ends early, or whose signature is wrong
            let chunk = chunk.map_err(|error| s3_error!(IncompleteBody, "{error}"))?;
            file.write_all(&chunk).map_err(internal)?;
            written += i64::try_from(chunk.len()).map_err(S3Error::internal_error)?;
        }
        if length.is_some_and(|length| length != written) {
            return Err(s3_error!(IncompleteBody));
        }
        Ok(path)
    }

    /// Makes a staged file an object, at once.
    #[expect(
        clippy::disallowed_methods,
        reason = "SIGKILL is what this survives: nothing is synced here"
    )]
    fn publish(
        &self,
        staged: &Path,
        object: &Path,
        condition: Option<&ETagCondition>,
    ) -> S3Result<ETag> {
        let folder = object.parent().ok_or_else(|| s3_error!(InvalidArgument))?;
        fs::create_dir_all(folder).map_err(internal)?;
        let etag = etag(&fs::metadata(staged).map_err(internal)?);
        if matches!(condition, Some(ETagCondition::Any)) && !self.ignore_conditions {
            // a link has one winner, and is never seen half
            let linked = fs::hard_link(staged, object);
            fs::remove_file(staged).map_err(internal)?;
            match linked {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    return Err(s3_error!(PreconditionFailed, "the object is there"));
                }
                linked => linked.map_err(internal)?,
            }
        } else {
            fs::rename(staged, object).map_err(internal)?;
        }
        Ok(etag)
    }

    fn remove(&self, bucket: &str, key: &str) -> S3Result<()> {
        match fs::remove_file(self.file_of(bucket, key)?) {
            Err(error) if !is_missing(&error) => Err(internal(error)),
            _ => Ok(()),
        }
    }

    /// The folder of an upload, which belongs to this object.
    fn upload(&self, bucket: &str, key: &str, id: &str) -> S3Result<PathBuf> {
        let known = |folder: &PathBuf| {
            fs::read_to_string(folder.join(TARGET)).is_ok_and(|at| at == target(bucket, key))
        };
        let hex = id
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
        Some(self.root.join(UPLOADS).join(id))
            .filter(|folder| hex && known(folder))
            .ok_or_else(|| s3_error!(NoSuchUpload, "no upload {id}"))
    }
}

/// An S3 object without its parts put together: what each file of a bucket says of it.
struct Listed {
    key: String,
    metadata: Metadata,
}

/// Every object below `folder` whose key begins with `prefix`, in no order; where it is not to be `deep`,
/// the folders in it instead of what they hold.
fn walk(
    folder: &Path,
    key: &str,
    prefix: &str,
    is_deep: bool,
    found: &mut Vec<Listed>,
) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_missing(&error) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
            continue;
        };
        let key = format!("{key}{name}");
        let Some(metadata) = still_there(&entry)? else {
            continue;
        };
        if metadata.is_dir() {
            let below = format!("{key}/");
            if !is_deep && below.starts_with(prefix) {
                // a bucket has no empty folders
                if holds_any(&entry.path())? {
                    found.push(Listed {
                        key: below,
                        metadata,
                    });
                }
            } else if below.starts_with(prefix) || prefix.starts_with(&below) {
                walk(&entry.path(), &below, prefix, is_deep, found)?;
            }
        } else if key.starts_with(prefix) {
            found.push(Listed { key, metadata });
        }
    }
    Ok(())
}

fn holds_any(folder: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Some(metadata) = still_there(&entry)? else {
            continue;
        };
        if !metadata.is_dir() || holds_any(&entry.path())? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn still_there(entry: &DirEntry) -> io::Result<Option<Metadata>> {
    match entry.metadata() {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A file where a folder should be has nothing below it.
fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory
    )
}

#[expect(clippy::needless_pass_by_value, reason = "map_err hands it over")]
fn internal(error: io::Error) -> S3Error {
    S3Error::with_message(s3s::S3ErrorCode::InternalError, error.to_string())
}

fn target(bucket: &str, key: &str) -> String {
    format!("{bucket}/{key}")
}

/// What S3 promises of it: another for another content.
fn etag(metadata: &Metadata) -> ETag {
    let (inode, second, nano) = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec());
    ETag::Strong(format!(
        "{inode:x}-{second:x}-{nano:x}-{:x}",
        metadata.len()
    ))
}

fn modified(metadata: &Metadata) -> Option<Timestamp> {
    metadata.modified().ok().map(Timestamp::from)
}

fn length(bytes: u64) -> Option<i64> {
    i64::try_from(bytes).ok()
}

/// `bytes` of `file`, read as they are sent.
fn body(file: File, bytes: std::ops::Range<u64>) -> io::Result<StreamingBlob> {
    let mut file = file;
    file.seek(SeekFrom::Start(bytes.start))?;
    let left = bytes.end - bytes.start;
    Ok(StreamingBlob::wrap(stream::try_unfold(
        (file, left),
        |(mut file, left)| async move {
            if left == 0 {
                return Ok::<_, io::Error>(None);
            }
            let take = usize::try_from(left).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
            let mut chunk = vec![0; take];
            file.read_exact(&mut chunk)?;
            let left = left - u64::try_from(take).map_err(io::Error::other)?;
            Ok(Some((Bytes::from(chunk), (file, left))))
        },
    )))
}

#[async_trait]
impl S3 for Objects {
    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.bucket(&request.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn put_object(
        &self,
        request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        let object = self.file_of(&input.bucket, &input.key)?;
        let staged = self.stage_body(input.body, input.content_length).await?;
        let etag = self.publish(&staged, &object, input.if_none_match.as_ref())?;
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(etag),
            ..Default::default()
        }))
    }

    async fn get_object(
        &self,
        request: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let (file, metadata) = self.open_object(&input.bucket, &input.key)?;
        let whole = metadata.len();
        let bytes = match input.range {
            Some(range) => range.check(whole)?,
            None => 0..whole,
        };
        let content_range = input
            .range
            .map(|_| format!("bytes {}-{}/{whole}", bytes.start, bytes.end - 1));
        Ok(S3Response::new(GetObjectOutput {
            content_length: length(bytes.end - bytes.start),
            content_range,
            e_tag: Some(etag(&metadata)),
            last_modified: modified(&metadata),
            body: Some(body(file, bytes).map_err(internal)?),
            ..Default::default()
        }))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let (_, metadata) = self.open_object(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(HeadObjectOutput {
            content_length: length(metadata.len()),
            e_tag: Some(etag(&metadata)),
            last_modified: modified(&metadata),
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.remove(&request.input.bucket, &request.input.key)?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let mut deleted = Vec::new();
        for object in request.input.delete.objects {
            self.remove(&request.input.bucket, &object.key)?;
            deleted.push(DeletedObject {
                key: Some(object.key),
                ..Default::default()
            });
        }
        Ok(S3Response::new(DeleteObjectsOutput {
            deleted: Some(deleted),
            ..Default::default()
        }))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        let bucket = self.bucket(&input.bucket)?;
        let prefix = input.prefix.as_deref().unwrap_or("");
        let folder = prefix.rfind('/').map_or("", |slash| &prefix[..=slash]);
        let mut found = Vec::new();
        let is_deep = input.delimiter.as_deref() != Some("/");
        walk(&bucket.join(folder), folder, prefix, is_deep, &mut found).map_err(internal)?;
        found.sort_by(|a, b| a.key.cmp(&b.key));

        // the token is the last entry that was given
        let after = input
            .continuation_token
            .as_ref()
            .or(input.start_after.as_ref());
        let page = input
            .max_keys
            .and_then(|keys| usize::try_from(keys).ok())
            .map_or(self.page, |keys| keys.min(self.page));
        let mut contents = Vec::new();
        let mut prefixes = BTreeSet::new();
        let (mut last, mut truncated) = (None, false);
        for listed in found {
            let rest = &listed.key[prefix.len()..];
            let delimited = input.delimiter.as_deref().and_then(|delimiter| {
                let at = rest.find(delimiter)?;
                Some(listed.key[..prefix.len() + at + delimiter.len()].to_owned())
            });
            let entry = delimited.clone().unwrap_or_else(|| listed.key.clone());
            if after.is_some_and(|after| entry <= *after) || prefixes.contains(&entry) {
                continue;
            }
            if contents.len() + prefixes.len() == page {
                truncated = true;
                break;
            }
            last = Some(entry.clone());
            if delimited.is_some() {
                prefixes.insert(entry);
            } else {
                contents.push(Object {
                    key: Some(entry),
                    size: length(listed.metadata.len()),
                    e_tag: Some(etag(&listed.metadata)),
                    last_modified: modified(&listed.metadata),
                    ..Default::default()
                });
            }
        }
        let common_prefixes: Vec<CommonPrefix> = prefixes
            .into_iter()
            .map(|prefix| CommonPrefix {
                prefix: Some(prefix),
            })
            .collect();
        Ok(S3Response::new(ListObjectsV2Output {
            key_count: i32::try_from(contents.len() + common_prefixes.len()).ok(),
            max_keys: i32::try_from(page).ok(),
            contents: Some(contents),
            common_prefixes: Some(common_prefixes),
            is_truncated: Some(truncated),
            next_continuation_token: last.filter(|_| truncated),
            continuation_token: input.continuation_token,
            delimiter: input.delimiter,
            name: Some(input.bucket),
            prefix: input.prefix,
            start_after: input.start_after,
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        self.file_of(&input.bucket, &input.key)?;
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(internal)?;
        let id = id.trim().to_owned();
        let folder = self.root.join(UPLOADS).join(&id);
        fs::create_dir(&folder).map_err(internal)?;
        fs::write(folder.join(TARGET), target(&input.bucket, &input.key)).map_err(internal)?;
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..Default::default()
        }))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument, "a part is 1 to 10000"));
        }
        let upload = self.upload(&input.bucket, &input.key, &input.upload_id)?;
        let staged = self.stage_body(input.body, input.content_length).await?;
        let part = upload.join(input.part_number.to_string());
        let etag = self.publish(&staged, &part, None)?;
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(etag),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        let object = self.file_of(&input.bucket, &input.key)?;
        let upload = self.upload(&input.bucket, &input.key, &input.upload_id)?;
        let parts = input.multipart_upload.and_then(|upload| upload.parts);
        let parts = parts.unwrap_or_default();
        let (mut whole, staged) = self.stage().map_err(internal)?;
        let mut before = 0;
        for (index, part) in parts.iter().enumerate() {
            let number = part.part_number.ok_or_else(|| s3_error!(InvalidPart))?;
            if number <= before {
                return Err(s3_error!(InvalidPartOrder));
            }
            before = number;
            let invalid = |error| s3_error!(InvalidPart, "part {number}: {error}");
            let mut file = File::open(upload.join(number.to_string())).map_err(invalid)?;
            let metadata = file.metadata().map_err(internal)?;
            if part.e_tag.as_ref() != Some(&etag(&metadata)) {
                return Err(s3_error!(InvalidPart, "part {number} has another tag"));
            }
            if metadata.len() < MIN_PART_BYTES && index + 1 < parts.len() {
                return Err(s3_error!(EntityTooSmall));
            }
            io::copy(&mut file, &mut whole).map_err(internal)?;
        }
        if parts.is_empty() {
            return Err(s3_error!(InvalidPart));
        }
        drop(whole);
        let etag = self.publish(&staged, &object, input.if_none_match.as_ref())?;
        // the object is there: only now is the upload over
        fs::remove_dir_all(upload).map_err(internal)?;
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(etag),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = request.input;
        let upload = self.upload(&input.bucket, &input.key, &input.upload_id)?;
        fs::remove_dir_all(upload).map_err(internal)?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = request.input;
        let bucket = format!("{}/", input.bucket);
        let mut uploads = Vec::new();
        for entry in fs::read_dir(self.root.join(UPLOADS)).map_err(internal)? {
            let entry = entry.map_err(internal)?;
            let target = fs::read_to_string(entry.path().join(TARGET)).unwrap_or_default();
            if let Some(key) = target.strip_prefix(&bucket) {
                uploads.push(MultipartUpload {
                    key: Some(key.to_owned()),
                    upload_id: entry.file_name().to_str().map(str::to_owned),
                    ..Default::default()
                });
            }
        }
        Ok(S3Response::new(ListMultipartUploadsOutput {
            bucket: Some(input.bucket),
            is_truncated: Some(false),
            uploads: Some(uploads),
            ..Default::default()
        }))
    }
}
