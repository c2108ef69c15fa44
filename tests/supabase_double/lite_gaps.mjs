// What @supabase/lite does otherwise than the services that it stands for, put right from outside.
// Loaded with `node --import` from a copy beside lite's own node_modules.
import { AsyncLocalStorage } from 'node:async_hooks';
import { Server } from 'node:http';
import { PostgresConnection } from '@supabase/lite/postgres';
import { sql } from 'kysely';

const STORAGE = '/storage/v1/';
const requestHeaders = new AsyncLocalStorage();
const { emit } = Server.prototype;
const { applyJwtSessionContext, ensureRlsContext } = PostgresConnection.prototype;

// The storage service decodes paths, and has the documented address of private objects.
function servedUrl(url) {
  if (!url.startsWith(STORAGE)) return url;
  return decodeURIComponent(url).replace('/object/authenticated/', '/object/');
}

Server.prototype.emit = function (event, request, ...rest) {
  if (event !== 'request') return emit.call(this, event, request, ...rest);
  request.url = servedUrl(request.url);
  const headers = JSON.stringify(request.headers);
  return requestHeaders.run(headers, () => emit.call(this, event, request, ...rest));
};

// PostgREST and the storage service set request.headers in every transaction; lite in calls of
// functions only.
PostgresConnection.prototype.applyJwtSessionContext = async function (db, ...rest) {
  await applyJwtSessionContext.call(this, db, ...rest);
  const headers = requestHeaders.getStore() ?? '{}';
  await sql`select set_config('request.headers', ${headers}, true)`.execute(db);
};

// An argument of type jsonb arrives as text already: encoded once more, an object becomes a string.
const asJson = (value) => (typeof value === 'string' ? value : JSON.stringify(value));
PostgresConnection.prototype.ensureRlsContext = function () {
  Object.assign(this.driver.options.serializers, { 114: asJson, 3802: asJson });
  return ensureRlsContext.call(this);
};
