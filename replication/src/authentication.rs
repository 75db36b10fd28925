//! Proving to a server who we are, and not more than the user allowed (fe-auth.c).
//!
//! What a server may ask for is a decision of the user's (`require_auth`, `channel_binding`): one
//! that poses as the server would ask for the password itself. So every request is checked
//! before anything is sent in answer.

use std::io;

use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message as Backend};
use postgres_protocol::message::frontend;
use tracing::{debug, warn};

use crate::conninfo::{AuthMethod, ChannelBindingMode, RequireAuth, Secret};
use crate::framing::{Framed, Message, WireError};
use crate::server_error::ServerError;

use fallible_iterator::FallibleIterator;

/// The most SCRAM iterations that are computed for a server, `postgres-protocol`'s limit:
/// PostgreSQL's default is 4096, and a hostile server could ask for days of work.
pub const SCRAM_ITERATIONS_MAX: u64 = 100_000;

/// What the server is to be convinced with, and how far to go.
pub(crate) struct Login<'a> {
    pub(crate) user: &'a str,
    pub(crate) password: &'a Password,
    pub(crate) require_auth: &'a RequireAuth,
    pub(crate) channel_binding: ChannelBindingMode,
    pub(crate) channel: Channel,
}

/// A password, or where it was looked for in vain.
#[derive(Debug)]
pub(crate) enum Password {
    Found { secret: Secret, from: String },
    Missing { searched: String },
}

/// What the messages run over.
#[derive(Debug)]
pub(crate) enum Channel {
    /// A Unix socket: nobody listens in.
    Local,
    /// TCP without TLS.
    Plain,
    Tls {
        /// RFC 5929's `tls-server-end-point`, unless the certificate's signature defines none.
        end_point: Option<Vec<u8>>,
    },
}

/// Why logging in failed.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The server asked for a password, and there is none.
    #[error(
        "the server asks for a password and none was found: user={user}, method={}, looked in {searched}",
        method.name()
    )]
    NoPassword {
        /// The role.
        user: String,
        /// How it would have been sent.
        method: AuthMethod,
        /// Where it was looked for.
        searched: String,
    },
    /// The server asked for something that `require_auth` excludes.
    #[error(
        "the server asks for a method that require_auth does not allow: asked={}, allowed={allowed}",
        asked.name()
    )]
    MethodNotAllowed {
        /// What it asked for.
        asked: AuthMethod,
        /// What it may ask for.
        allowed: String,
    },
    /// `channel_binding=require` cannot be met.
    #[error("channel_binding=require cannot be met: {0}")]
    NotBound(&'static str),
    /// The server asked for something that is not done here.
    #[error(
        "the server asks for {asked} authentication, which is not supported: give this user a line \
         with scram-sha-256, cert or peer in pg_hba.conf"
    )]
    MethodUnsupported {
        /// What it asked for.
        asked: String,
    },
    /// The server offers channel binding without TLS, which no server does.
    #[error("the server offers channel binding on a connection without TLS; is it PostgreSQL?")]
    BindingWithoutTls,
    /// The password was hashed with more iterations than are computed here.
    #[error(
        "the server wants too many SCRAM iterations: found={found}, limit={SCRAM_ITERATIONS_MAX}; \
         set scram_iterations lower and set the password again"
    )]
    Iterations {
        /// How many it wants.
        found: u64,
    },
    /// The exchange went wrong on the server's side: most of all, it could not prove that it
    /// knows the password itself.
    #[error("the SCRAM exchange with the server failed: {0}")]
    Scram(#[source] io::Error),
    /// The server let us in before it proved that it knows the password.
    #[error("the server did not complete the SCRAM exchange")]
    Incomplete,
    /// The server refused.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The connection failed, or the peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A message that has no place here.
    #[error("unexpected message while logging in: found={found}")]
    Unexpected {
        /// The message's name.
        found: &'static str,
    },
}

/// How far the exchange has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The server has not asked for anything.
    NothingAsked,
    /// It asked, and was told what it asked for.
    PasswordSent,
    /// Both sides proved that they know the password.
    Proven {
        /// And that they speak through the same TLS session.
        bound: bool,
    },
}

/// Answers the server until it says `AuthenticationOk`. `progress` tells how far it came, also
/// where it failed.
pub(crate) async fn log_in(
    framed: &mut Framed,
    login: &Login<'_>,
    progress: &mut Progress,
) -> Result<(), LoginError> {
    loop {
        let request = read(framed).await?;
        let first = *progress == Progress::NothingAsked;
        match request {
            Backend::AuthenticationOk => return login.accept(*progress),
            Backend::AuthenticationCleartextPassword if first => {
                let secret = login.password_for(AuthMethod::Password)?;
                if matches!(login.channel, Channel::Plain) {
                    warn!("the server asks for the password in clear text, and there is no TLS");
                }
                *progress = Progress::PasswordSent;
                send_password(framed, secret.expose()).await?;
            }
            Backend::AuthenticationMd5Password(body) if first => {
                let secret = login.password_for(AuthMethod::Md5)?;
                let hash = md5_hash(login.user.as_bytes(), secret.expose(), body.salt());
                *progress = Progress::PasswordSent;
                send_password(framed, hash.as_bytes()).await?;
            }
            Backend::AuthenticationSasl(body) if first => {
                let (mechanism, binding) = login.choose_mechanism(&Offer::read(&body)?)?;
                let secret = login.password_for(AuthMethod::ScramSha256)?;
                *progress = Progress::PasswordSent;
                scram(
                    framed,
                    mechanism,
                    ScramSha256::new(secret.expose(), binding),
                )
                .await?;
                *progress = Progress::Proven {
                    bound: mechanism == SCRAM_SHA_256_PLUS,
                };
            }
            Backend::AuthenticationGss | Backend::AuthenticationGssContinue(_) => {
                return Err(unsupported("GSSAPI"));
            }
            Backend::AuthenticationSspi => return Err(unsupported("SSPI")),
            Backend::AuthenticationKerberosV5 => return Err(unsupported("Kerberos 5")),
            Backend::AuthenticationScmCredential => return Err(unsupported("SCM credential")),
            other => {
                return Err(LoginError::Unexpected {
                    found: Message::Backend(other).name(),
                });
            }
        }
    }
}

impl Login<'_> {
    /// The password, if the server may ask for it in this way.
    fn password_for(&self, method: AuthMethod) -> Result<&Secret, LoginError> {
        self.check_allowed(method)?;
        if self.channel_binding == ChannelBindingMode::Require && method != AuthMethod::ScramSha256
        {
            return Err(LoginError::NotBound(
                "the server does not ask for scram-sha-256",
            ));
        }
        match self.password {
            Password::Found { secret, .. } => Ok(secret),
            Password::Missing { searched } => Err(LoginError::NoPassword {
                user: self.user.to_owned(),
                method,
                searched: searched.clone(),
            }),
        }
    }

    fn check_allowed(&self, asked: AuthMethod) -> Result<(), LoginError> {
        if self.require_auth.allows(asked) {
            return Ok(());
        }
        Err(LoginError::MethodNotAllowed {
            asked,
            allowed: self.require_auth.names(),
        })
    }

    /// Which SASL mechanism to use, and what to say about channel binding.
    ///
    /// Saying "I could have, but you did not offer it" lets the server find out that someone
    /// between us took its offer away; it is said only where it is true.
    fn choose_mechanism(
        &self,
        offer: &Offer,
    ) -> Result<(&'static str, ChannelBinding), LoginError> {
        let required = self.channel_binding == ChannelBindingMode::Require;
        let wanted = self.channel_binding != ChannelBindingMode::Disable;
        let end_point = match &self.channel {
            Channel::Tls { end_point } => end_point.as_ref(),
            Channel::Local | Channel::Plain if offer.plus => {
                return Err(LoginError::BindingWithoutTls);
            }
            Channel::Local | Channel::Plain if required => {
                return Err(LoginError::NotBound("the connection has no TLS"));
            }
            Channel::Local | Channel::Plain => None,
        };
        match end_point {
            Some(hash) if offer.plus && wanted => {
                return Ok((
                    SCRAM_SHA_256_PLUS,
                    ChannelBinding::tls_server_end_point(hash.clone()),
                ));
            }
            None if required => {
                return Err(LoginError::NotBound(
                    "the signature of the server's certificate defines no hash for it",
                ));
            }
            Some(_) if required => {
                return Err(LoginError::NotBound(
                    "the server does not offer SCRAM-SHA-256-PLUS",
                ));
            }
            _ => {}
        }
        if !offer.scram {
            return Err(unsupported(&offer.names));
        }
        let binding = if wanted && !offer.plus && end_point.is_some() {
            ChannelBinding::unrequested()
        } else {
            ChannelBinding::unsupported()
        };
        Ok((SCRAM_SHA_256, binding))
    }

    /// Whether being let in after this is what the user wants.
    fn accept(&self, progress: Progress) -> Result<(), LoginError> {
        if progress == Progress::NothingAsked {
            self.check_allowed(AuthMethod::None)?;
        }
        if self.channel_binding == ChannelBindingMode::Require
            && progress != (Progress::Proven { bound: true })
        {
            return Err(LoginError::NotBound(
                "the server let us in without SCRAM-SHA-256-PLUS",
            ));
        }
        Ok(())
    }
}

/// The SASL mechanisms that a server offers.
struct Offer {
    scram: bool,
    plus: bool,
    names: String,
}

impl Offer {
    fn read(body: &AuthenticationSaslBody) -> Result<Self, LoginError> {
        let malformed = |reason| WireError::Malformed { tag: 'R', reason };
        let mut offer = Self {
            scram: false,
            plus: false,
            names: String::new(),
        };
        let mut mechanisms = body.mechanisms();
        while let Some(mechanism) = mechanisms.next().map_err(malformed)? {
            match mechanism {
                SCRAM_SHA_256 => offer.scram = true,
                SCRAM_SHA_256_PLUS => offer.plus = true,
                _ => {}
            }
            if !offer.names.is_empty() {
                offer.names.push_str(", ");
            }
            offer.names.push_str(mechanism);
        }
        Ok(offer)
    }
}

/// RFC 5802's exchange, to the point where the server has proven that it knows the password.
async fn scram(
    framed: &mut Framed,
    mechanism: &str,
    mut exchange: ScramSha256,
) -> Result<(), LoginError> {
    queue(framed, |out| {
        frontend::sasl_initial_response(mechanism, exchange.message(), out)
    })?;
    framed.flush().await?;
    let challenge = match read(framed).await? {
        Backend::AuthenticationSaslContinue(body) => body,
        other => return Err(out_of_turn(other)),
    };
    check_iterations(challenge.data())?;
    exchange
        .update(challenge.data())
        .map_err(LoginError::Scram)?;

    queue(framed, |out| {
        frontend::sasl_response(exchange.message(), out)
    })?;
    framed.flush().await?;
    let outcome = match read(framed).await? {
        Backend::AuthenticationSaslFinal(body) => body,
        other => return Err(out_of_turn(other)),
    };
    exchange.finish(outcome.data()).map_err(LoginError::Scram)
}

fn out_of_turn(message: Backend) -> LoginError {
    match message {
        Backend::AuthenticationOk => LoginError::Incomplete,
        other => LoginError::Unexpected {
            found: Message::Backend(other).name(),
        },
    }
}

/// `postgres-protocol` refuses too many as well, but does not say what to do about it.
fn check_iterations(challenge: &[u8]) -> Result<(), LoginError> {
    let iterations = challenge
        .split(|&byte| byte == b',')
        .find_map(|attribute| attribute.strip_prefix(b"i="))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<u64>().ok());
    match iterations {
        Some(found) if found > SCRAM_ITERATIONS_MAX => Err(LoginError::Iterations { found }),
        // what is malformed is found by the exchange itself
        _ => Ok(()),
    }
}

async fn send_password(framed: &mut Framed, password: &[u8]) -> Result<(), LoginError> {
    queue(framed, |out| frontend::password_message(password, out))?;
    Ok(framed.flush().await?)
}

fn queue(
    framed: &mut Framed,
    write: impl FnOnce(&mut bytes::BytesMut) -> io::Result<()>,
) -> Result<(), LoginError> {
    // a password with a zero byte cannot be sent, and cannot have been set either
    framed
        .queue_with(write)
        .map_err(|reason| LoginError::Wire(WireError::Write(reason)))
}

/// The next message that is not merely said in passing.
pub(crate) async fn read(framed: &mut Framed) -> Result<Backend, LoginError> {
    loop {
        match framed.read_message().await? {
            Message::Backend(Backend::ErrorResponse(body)) => {
                return Err(ServerError::of_error(&body).into());
            }
            Message::Backend(Backend::NoticeResponse(body)) => {
                debug!("the server says: {}", ServerError::of_notice(&body));
            }
            // we ask for 3.0 and no options, so that nothing is lost when the server knows less
            Message::NegotiateProtocolVersion {
                newest_minor,
                unknown_options,
            } => {
                debug!(
                    newest_minor,
                    ?unknown_options,
                    "the server negotiates the protocol"
                );
            }
            Message::Backend(message) => return Ok(message),
            other => {
                return Err(LoginError::Unexpected {
                    found: other.name(),
                });
            }
        }
    }
}

fn unsupported(asked: &str) -> LoginError {
    LoginError::MethodUnsupported {
        asked: asked.to_owned(),
    }
}
