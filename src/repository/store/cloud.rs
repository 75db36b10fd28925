//! The three providers' clients, made from settings and from where each provider's own tools
//! look for credentials.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::multipart::MultipartStore;
use object_store::{Certificate, ClientOptions, ObjectStore, RetryConfig};

use super::address::{Provider, without_secrets};
use super::answer::Answering;
use super::aws_profile::{self, Profile};
use super::bounded::Bounded;
use super::{StoreError, StoreOptions};

/// A provider's store, and where its credentials come from.
#[derive(Debug)]
pub(super) struct Cloud {
    pub(super) client: Bounded,
    pub(super) credentials: String,
}

/// Makes a client; nothing is asked of the provider yet.
pub(super) fn open(
    provider: Provider,
    bucket: &str,
    options: &StoreOptions,
) -> Result<Cloud, StoreError> {
    check(provider, options)?;
    match provider {
        Provider::S3 => s3(bucket, options),
        Provider::Google => google(bucket, options),
        Provider::Azure => azure(bucket, options),
    }
}

/// Settings of one provider are no settings of another: what was asked for and is not done would
/// be found out too late.
fn check(provider: Provider, options: &StoreOptions) -> Result<(), StoreError> {
    let s3_only = [
        ("region", options.region.is_some()),
        ("path_style", options.path_style.is_some()),
        ("profile", options.profile.is_some()),
        (
            "server_side_encryption",
            options.server_side_encryption.is_some(),
        ),
        ("kms_key_id", options.kms_key_id.is_some()),
        ("bucket_key", options.bucket_key.is_some()),
    ];
    let foreign = s3_only.iter().filter(|_| provider != Provider::S3);
    if let Some((name, _)) = foreign.into_iter().find(|(_, is_set)| *is_set) {
        return Err(
            wrong(format!("{name} is a setting of s3:// repositories alone"))
                .hint(format!("remove it from the settings of {}", options.url)),
        );
    }
    if provider != Provider::Azure && options.account.is_some() {
        return Err(wrong("account is a setting of az:// repositories alone")
            .hint(format!("remove it from the settings of {}", options.url)));
    }
    if let Some(endpoint) = &options.endpoint {
        check_endpoint(endpoint, options.allow_http || allows_http(provider))?;
    }
    check_encryption(options)?;
    let Some(class) = &options.storage_class else {
        return Ok(());
    };
    if provider == Provider::Azure {
        return Err(wrong("an az:// repository takes no storage_class")
            .hint("set the storage account's default access tier"));
    }
    if matches!(class.as_str(), "GLACIER" | "DEEP_ARCHIVE") {
        return Err(wrong(format!("objects of storage class {class} cannot be read at once"))
            .hint("a restore would wait for hours: use STANDARD_IA or GLACIER_IR, or a lifecycle rule for old backups"));
    }
    Ok(())
}

/// Whether the environment accepts connections that are not encrypted.
fn allows_http(provider: Provider) -> bool {
    provider == Provider::S3 && variable("AWS_ALLOW_HTTP").as_deref() == Some("true")
}

fn wrong(message: impl Into<String>) -> StoreError {
    StoreError::url(message)
}

fn s3(bucket: &str, options: &StoreOptions) -> Result<Cloud, StoreError> {
    let found = aws_profile::find(options.profile.as_deref())
        .map_err(|error| wrong(format!("AWS credentials: {error}")).hint(error.way_out()))?;
    let mut builder = from_environment()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        // one object at a time, by the request that every compatible store knows
        .with_disable_bulk_delete(true)
        .with_retry(no_retries())
        .with_http_connector(Answering);
    let set = |builder: &AmazonS3Builder, key| builder.get_config_value(&key);
    let has_keys = set(&builder, AmazonS3ConfigKey::AccessKeyId).is_some();
    let profile = found.profile.as_ref();

    let from_environment = set(&builder, AmazonS3ConfigKey::Region);
    let from_profile = || profile.and_then(|profile| profile.region.clone());
    if let Some(region) = options
        .region
        .clone()
        .or(from_environment)
        .or_else(from_profile)
    {
        builder = builder.with_region(region);
    }
    let from_environment = variable("AWS_ENDPOINT_URL_S3")
        .or_else(|| set(&builder, AmazonS3ConfigKey::S3Endpoint))
        .or_else(|| set(&builder, AmazonS3ConfigKey::Endpoint));
    let from_profile = || profile.and_then(|profile| profile.endpoint_url.clone());
    let endpoint = options
        .endpoint
        .clone()
        .or(from_environment)
        .or_else(from_profile);
    let allow_http = options.allow_http || allows_http(Provider::S3);
    // a bucket with a dot in its name has no certificate as a host
    let path_style = options
        .path_style
        .unwrap_or_else(|| endpoint.is_some() || bucket.contains('.'));
    builder = builder.with_virtual_hosted_style_request(!path_style);
    if let Some(endpoint) = &endpoint {
        check_endpoint(endpoint, allow_http)?;
        let endpoint = if path_style {
            endpoint.trim_end_matches('/').to_owned()
        } else {
            with_host_prefix(endpoint, bucket)?
        };
        builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
    }

    let credentials;
    if has_keys && options.profile.is_none() {
        credentials = "the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY".to_owned();
    } else if let Some(Profile {
        source: Some(source),
        ..
    }) = profile
    {
        credentials = source.to_string();
        builder = match source.provider() {
            aws_profile::Given::Provider(provider) => builder.with_credentials(provider),
            aws_profile::Given::WebIdentity { token_file, role } => builder
                .with_config(AmazonS3ConfigKey::WebIdentityTokenFile, token_file)
                .with_config(AmazonS3ConfigKey::RoleArn, role),
        };
    } else {
        credentials = machine_credentials()?.to_owned();
    }
    builder = encrypted(builder, options)?;

    let ca_file = options
        .ca_file
        .clone()
        .or_else(|| variable("AWS_CA_BUNDLE").map(PathBuf::from));
    let store = builder
        .with_client_options(client_options(options, allow_http, ca_file.as_deref())?)
        .build()
        .map_err(unbuilt)?;
    Ok(Cloud {
        client: bounded(Arc::new(store), options),
        credentials,
    })
}

/// The `AWS_*` variables; empty ones, as containers are given them, say nothing.
fn from_environment() -> AmazonS3Builder {
    let mut builder = AmazonS3Builder::new();
    for (name, value) in std::env::vars_os() {
        let (Some(name), Some(value)) = (name.to_str(), value.to_str()) else {
            continue;
        };
        let is_ours = name.starts_with("AWS_") && !value.is_empty();
        if let (true, Ok(key)) = (is_ours, name.to_ascii_lowercase().parse()) {
            builder = builder.with_config(key, value);
        }
    }
    builder
}

fn check_encryption(options: &StoreOptions) -> Result<(), StoreError> {
    let Some(kind) = options.server_side_encryption.as_deref() else {
        if options.kms_key_id.is_some() || options.bucket_key.is_some() {
            return Err(
                wrong("kms_key_id and bucket_key need server_side_encryption")
                    .hint("set server_side_encryption = \"aws:kms\""),
            );
        }
        return Ok(());
    };
    if !matches!(kind, "AES256" | "aws:kms" | "aws:kms:dsse") {
        return Err(wrong(format!("unknown server_side_encryption: {kind:?}"))
            .hint("use \"AES256\", \"aws:kms\" or \"aws:kms:dsse\""));
    }
    if kind == "AES256" && options.kms_key_id.is_some() {
        return Err(
            wrong("AES256 takes no kms_key_id").hint("set server_side_encryption = \"aws:kms\"")
        );
    }
    Ok(())
}

/// Which of a machine's own credentials `object_store` will ask for, in its order.
fn machine_credentials() -> Result<&'static str, StoreError> {
    let has = |name: &str| variable(name).is_some();
    if has("AWS_WEB_IDENTITY_TOKEN_FILE") && has("AWS_ROLE_ARN") {
        Ok("the web identity of AWS_ROLE_ARN")
    } else if has("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") {
        Ok("the container's task role")
    } else if has("AWS_CONTAINER_CREDENTIALS_FULL_URI") {
        Ok("the pod's identity")
    } else if variable("AWS_EC2_METADATA_DISABLED").as_deref() == Some("true") {
        Err(wrong("no AWS credentials were found").hint(
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws/credentials",
        ))
    } else {
        Ok("the instance's role (no keys in the environment, no profile)")
    }
}

fn encrypted(
    builder: AmazonS3Builder,
    options: &StoreOptions,
) -> Result<AmazonS3Builder, StoreError> {
    let Some(kind) = options.server_side_encryption.as_deref() else {
        return Ok(builder);
    };
    let key = |name: &str| name.parse::<AmazonS3ConfigKey>().map_err(unbuilt);
    let mut builder = builder.with_config(key("aws_server_side_encryption")?, kind);
    if let Some(id) = &options.kms_key_id {
        builder = builder.with_config(key("aws_sse_kms_key_id")?, id);
    }
    if let Some(bucket_key) = options.bucket_key {
        builder = builder.with_bucket_key(bucket_key);
    }
    Ok(builder)
}

fn google(bucket: &str, options: &StoreOptions) -> Result<Cloud, StoreError> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(bucket)
        .with_retry(no_retries())
        .with_http_connector(Answering);
    let set = |key: GoogleConfigKey| builder.get_config_value(&key).is_some();
    let credentials = if set(GoogleConfigKey::ServiceAccountKey) {
        "the key in GOOGLE_SERVICE_ACCOUNT_KEY"
    } else if set(GoogleConfigKey::ServiceAccount) {
        "the service account in GOOGLE_SERVICE_ACCOUNT"
    } else if set(GoogleConfigKey::ApplicationCredentials) {
        "the file in GOOGLE_APPLICATION_CREDENTIALS"
    } else {
        "gcloud's application default credentials, or the instance's own"
    };
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_base_url(endpoint.trim_end_matches('/'));
    }
    let store = builder
        .with_client_options(client_options(
            options,
            options.allow_http,
            options.ca_file.as_deref(),
        )?)
        .build()
        .map_err(unbuilt)?;
    Ok(Cloud {
        client: bounded(Arc::new(store), options),
        credentials: credentials.to_owned(),
    })
}

fn azure(container: &str, options: &StoreOptions) -> Result<Cloud, StoreError> {
    let mut builder = MicrosoftAzureBuilder::from_env()
        .with_container_name(container)
        .with_retry(no_retries())
        .with_http_connector(Answering);
    if let Some(account) = &options.account {
        builder = builder.with_account(account);
    }
    let set = |key: AzureConfigKey| builder.get_config_value(&key).is_some();
    let is_emulator = variable("AZURE_STORAGE_USE_EMULATOR").as_deref() == Some("true");
    if !set(AzureConfigKey::AccountName) && !is_emulator {
        return Err(wrong("the address of a container needs a storage account")
            .hint("set the repository's account, or AZURE_STORAGE_ACCOUNT_NAME"));
    }
    let credentials = if set(AzureConfigKey::Token) {
        "the token in the environment"
    } else if set(AzureConfigKey::AccessKey) {
        "the key in AZURE_STORAGE_ACCOUNT_KEY"
    } else if set(AzureConfigKey::FederatedTokenFile) {
        "the workload identity in AZURE_FEDERATED_TOKEN_FILE"
    } else if set(AzureConfigKey::ClientSecret) {
        "the service principal in AZURE_CLIENT_ID"
    } else if set(AzureConfigKey::SasKey) {
        "the shared access signature in the environment"
    } else {
        "the machine's managed identity"
    };
    if let Some(endpoint) = &options.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    let store = builder
        .with_client_options(client_options(
            options,
            options.allow_http,
            options.ca_file.as_deref(),
        )?)
        .build()
        .map_err(unbuilt)?;
    Ok(Cloud {
        client: bounded(Arc::new(store), options).without_suffixes(),
        credentials: credentials.to_owned(),
    })
}

fn bounded<S: ObjectStore + MultipartStore>(store: Arc<S>, options: &StoreOptions) -> Bounded {
    let objects: Arc<dyn ObjectStore> = Arc::<S>::clone(&store);
    let client =
        Bounded::new(objects, options.concurrency, options.request_timeout).with_parts(store);
    match &options.storage_class {
        Some(class) => client.with_storage_class(class),
        None => client,
    }
}

/// One policy retries, and it is ours.
fn no_retries() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        ..RetryConfig::default()
    }
}

fn client_options(
    options: &StoreOptions,
    allow_http: bool,
    ca_file: Option<&Path>,
) -> Result<ClientOptions, StoreError> {
    // whole requests are bounded by their size, one layer up
    let mut client = ClientOptions::new()
        .with_allow_http(allow_http)
        .with_connect_timeout(options.connect_timeout)
        .with_timeout_disabled()
        .with_pool_max_idle_per_host(options.concurrency);
    for certificate in ca_file.map(certificates).transpose()?.into_iter().flatten() {
        client = client.with_root_certificate(certificate);
    }
    Ok(client)
}

fn certificates(file: &Path) -> Result<Vec<Certificate>, StoreError> {
    let unread = |reason: String| {
        wrong(format!(
            "cannot read certificates from {}: {reason}",
            file.display()
        ))
        .hint("ca_file (or AWS_CA_BUNDLE) names a file of PEM certificates")
    };
    let pem = std::fs::read(file).map_err(|error| unread(error.to_string()))?;
    let found = Certificate::from_pem_bundle(&pem).map_err(|error| unread(error.to_string()))?;
    if found.is_empty() {
        return Err(unread("it holds none".to_owned()));
    }
    Ok(found)
}

fn check_endpoint(endpoint: &str, allow_http: bool) -> Result<(), StoreError> {
    let shown = without_secrets(endpoint);
    let refused = |why: &str, hint: &str| {
        Err(wrong(format!("not a usable endpoint, {why}: endpoint={shown}")).hint(hint))
    };
    let example = "write it as https://host or https://host:port";
    let Ok(url) = url::Url::parse(endpoint) else {
        return refused("it is no URL", example);
    };
    if !url.username().is_empty() || url.password().is_some() {
        return refused(
            "it holds credentials",
            "credentials come from the environment or the provider's files",
        );
    }
    match url.scheme() {
        _ if url.host_str().is_none_or(str::is_empty) => refused("it names no host", example),
        "https" => Ok(()),
        "http" if allow_http => Ok(()),
        "http" => refused(
            "it is not encrypted",
            "use https, or set allow_http = true if nobody can listen on the way",
        ),
        _ => refused("its scheme is not https", example),
    }
}

/// `https://host` becomes `https://bucket.host`.
fn with_host_prefix(endpoint: &str, bucket: &str) -> Result<String, StoreError> {
    let (scheme, rest) = endpoint
        .trim_end_matches('/')
        .split_once("://")
        .ok_or_else(|| wrong("the endpoint is no URL"))?;
    Ok(format!("{scheme}://{bucket}.{rest}"))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "for map_err, which hands errors over"
)]
fn unbuilt(error: object_store::Error) -> StoreError {
    wrong(crate::error::chain(&error))
        .hint("check the settings and the environment of this repository")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(options: &StoreOptions) -> String {
        let provider = match &options.url[..2] {
            "s3" => Provider::S3,
            "gs" => Provider::Google,
            _ => Provider::Azure,
        };
        let error = check(provider, options).unwrap_err();
        crate::error::Error::from(error).to_string()
    }

    #[test]
    fn settings_that_would_do_nothing_or_harm_are_refused() {
        // a backup that is not encrypted as asked, or cannot be read back, is found out too late
        let at = StoreOptions::at;
        let some = |text: &str| Some(text.to_owned());
        for (options, word) in [
            (
                StoreOptions {
                    region: some("x"),
                    ..at("gs://b/x")
                },
                "region is a setting",
            ),
            (
                StoreOptions {
                    kms_key_id: some("x"),
                    ..at("az://b/x")
                },
                "kms_key_id is a",
            ),
            (
                StoreOptions {
                    account: some("x"),
                    ..at("s3://b/x")
                },
                "account is a setting",
            ),
            (
                StoreOptions {
                    storage_class: some("GLACIER"),
                    ..at("s3://b")
                },
                "at once",
            ),
            (
                StoreOptions {
                    storage_class: some("Cool"),
                    ..at("az://b")
                },
                "no storage_class",
            ),
            (
                StoreOptions {
                    kms_key_id: some("x"),
                    ..at("s3://b")
                },
                "server_side_encryption",
            ),
            (
                StoreOptions {
                    server_side_encryption: some("kms"),
                    ..at("s3://b")
                },
                "unknown",
            ),
            (
                StoreOptions {
                    endpoint: some("http://h"),
                    ..at("s3://b")
                },
                "allow_http",
            ),
            (
                StoreOptions {
                    endpoint: some("http://h"),
                    ..at("gs://b")
                },
                "allow_http",
            ),
            (
                StoreOptions {
                    endpoint: some("host:9000"),
                    ..at("s3://b")
                },
                "endpoint",
            ),
            (
                StoreOptions {
                    endpoint: some("https://a:SECRET@h"),
                    ..at("s3://b")
                },
                "credentials",
            ),
        ] {
            let said = said(&options);
            assert!(said.contains(word), "{options:?}: {said}");
            assert!(
                !said.contains("SECRET") && said.contains("hint: "),
                "{said}"
            );
        }
    }

    #[test]
    fn certificates_that_cannot_be_read_are_not_left_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [Path::new("/nonexistent"), file.path()] {
            let error = certificates(path).unwrap_err();
            assert!(matches!(error, StoreError::Settings { .. }), "{error}");
        }
    }

    #[test]
    fn a_bucket_stands_in_the_host_only_where_it_can() {
        assert_eq!(
            with_host_prefix("https://h:9/", "b").unwrap(),
            "https://b.h:9"
        );
        assert!(with_host_prefix("h", "b").is_err());
    }
}
